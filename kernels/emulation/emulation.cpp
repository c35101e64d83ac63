/* The emulator's scheduler: fibers, barriers, warp operations. */
#include "kernels/emulation/emulation.h"

#include <sched.h>

#include <algorithm>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SWITCH_BEGIN(save, bottom, bytes) __sanitizer_start_switch_fiber(save, bottom, bytes)
#define SWITCH_END(saved, bottom, bytes) __sanitizer_finish_switch_fiber(saved, bottom, bytes)
/* A fiber ends without returning: its frames' red zones stay behind. */
#define STACK_FRESH(stack, bytes) __asan_unpoison_memory_region(stack, bytes)
#else
#define SWITCH_BEGIN(save, bottom, bytes) ((void)(save), (void)(bottom), (void)(bytes))
#define SWITCH_END(saved, bottom, bytes) ((void)(saved), (void)(bottom), (void)(bytes))
#define STACK_FRESH(stack, bytes) ((void)(stack), (void)(bytes))
#endif

/* Saves the registers a callee owns, stores the stack pointer at *save, and goes on at `to`. */
extern "C" void emulation_switch(void **save, void *to);
asm(".text\n"
    ".globl emulation_switch\n"
    ".type emulation_switch, @function\n"
    "emulation_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n"
    ".size emulation_switch, . - emulation_switch\n");

static int scheduling_order;
static uint32_t scheduling_seed = 1;

extern "C" void emulation_set_order(int order, uint32_t seed) {
    scheduling_order = order;
    scheduling_seed = seed;
}

namespace emulation {

/* ASan's frames are large. */
static const size_t STACK_BYTES = 128 << 10;

thread_local block *current_block;
thread_local lane *current_lane;

int order() {
    return scheduling_order;
}

block::~block() {
    for (lane &l : lanes) free(l.stack);
}

static block &own_block() {
    static thread_local block b;
    return b;
}

void die(const char *why) {
    block *b = current_block;
    fprintf(stderr, "emulated device: %s in block (%u,%u,%u) of %u,%u,%u, order %d\n", why,
            b->index.x, b->index.y, b->index.z, b->grid.x, b->grid.y, b->grid.z, scheduling_order);
    int shown = 0;
    for (int i = 0; i < b->n && shown < 8; i++) {
        lane &l = b->lanes[(size_t)i];
        if (l.state == DONE) continue;
        fprintf(stderr, "  thread %d: state %d, operation %d, mask %08x\n", i, l.state, l.op, l.mask);
        shown++;
    }
    abort();
}

void *shared_of(const void *where, size_t bytes) {
    block *b = current_block;
    for (shared_object &object : b->objects) {
        if (object.where == where) return object.bytes.data();
    }
    b->objects.push_back({where, std::vector<char>(bytes, (char)0xff)});
    return b->objects.back().bytes.data();
}

/* From a lane to the scheduler, until the lane is chosen again. */
static void yield() {
    block *b = current_block;
    lane *l = current_lane;
    SWITCH_BEGIN(&l->fake_stack, b->os_stack, b->os_stack_bytes);
    emulation_switch(&l->stack_pointer, b->scheduler);
    SWITCH_END(l->fake_stack, &b->os_stack, &b->os_stack_bytes);
}

void pause() {
    sched_yield();
    yield();
}

static void release_block() {
    block *b = current_block;
    b->last_true = b->n_true;
    b->n_true = b->n_arrived = 0;
    for (int i = 0; i < b->n; i++) {
        lane &l = b->lanes[(size_t)i];
        if (l.state == WAIT_BLOCK) l.state = READY;
    }
}

int barrier(bool predicate) {
    block *b = current_block;
    lane *l = current_lane;
    b->n_true += predicate;
    l->state = WAIT_BLOCK;
    if (++b->n_arrived == b->n_live) release_block();
    while (l->state == WAIT_BLOCK) yield();
    return b->last_true;
}

static void release_warp(int warp, uint32_t mask) {
    block *b = current_block;
    lane *lanes = &b->lanes[(size_t)warp * 32];
    warp_op op = current_lane->op;
    uint32_t ballot = 0;
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (lanes[i].op != op || lanes[i].mask != mask) die("diverged warp operation");
        ballot |= (lanes[i].predicate ? 1u : 0u) << i;
    }
    if (op == COLLECTIVE) {
        void *arguments[32];
        for (int i = 0; i < 32; i++) arguments[i] = lanes[i].argument;
        current_lane->collective(arguments);
    }
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        lane &l = lanes[i];
        if (op == SHUFFLE) l.result = mask >> l.source & 1 ? lanes[l.source].value : l.value;
        if (op == BALLOT) l.result = ballot;
        l.state = READY;
    }
    b->warp_arrived[warp] &= ~mask;
}

uint64_t warp_operation(warp_op op, uint32_t mask, uint64_t value, int source, bool predicate) {
    block *b = current_block;
    lane *l = current_lane;
    int thread = b->current, warp = thread / 32, in_warp = thread & 31;
    int n = b->n - warp * 32;
    if (n < 32) mask &= (1u << n) - 1;
    if (!(mask >> in_warp & 1)) die("a lane calls a warp operation whose mask leaves it out");
    l->op = op;
    l->mask = mask;
    l->value = value;
    l->source = source & 31;
    l->predicate = predicate;
    l->state = WAIT_WARP;
    b->warp_arrived[warp] |= 1u << in_warp;
    if ((b->warp_arrived[warp] & mask) == mask) release_warp(warp, mask);
    while (l->state == WAIT_WARP) yield();
    return l->result;
}

void collective(void *argument, void (*all)(void **)) {
    current_lane->argument = argument;
    current_lane->collective = all;
    warp_operation(COLLECTIVE, ~0u, 0, 0, false);
}

/* Where a fiber begins; never returns. */
static void run_lane() {
    block *b = current_block;
    SWITCH_END(nullptr, &b->os_stack, &b->os_stack_bytes);
    (*b->kernel)();
    if (!current_lane->open.empty()) current_lane->open.clear();
    current_lane->state = DONE;
    b->n_live--;
    if (b->n_live > 0 && b->n_arrived == b->n_live) release_block();
    SWITCH_BEGIN(nullptr, b->os_stack, b->os_stack_bytes);
    void *nowhere;
    emulation_switch(&nowhere, b->scheduler);
    abort();
}

static void prepare_lane(block *b, int i) {
    lane &l = b->lanes[(size_t)i];
    if (l.stack == nullptr) l.stack = aligned_alloc(64, STACK_BYTES);
    STACK_FRESH(l.stack, STACK_BYTES);
    dim3 size = b->size;
    l.thread = dim3((unsigned)i % size.x, (unsigned)i / size.x % size.y,
                    (unsigned)i / (size.x * size.y));
    l.state = READY;
    l.open.clear();
    l.groups.clear();
    void **top = reinterpret_cast<void **>(static_cast<char *>(l.stack) + STACK_BYTES) - 2;
    *top = reinterpret_cast<void *>(run_lane);
    top -= 6;
    memset(top, 0, 6 * sizeof *top);
    l.stack_pointer = top;
}

static void run_slice(block *b, int i) {
    lane &l = b->lanes[(size_t)i];
    b->current = i;
    current_lane = &l;
    SWITCH_BEGIN(&b->fake_stack, l.stack, STACK_BYTES);
    emulation_switch(&b->scheduler, l.stack_pointer);
    SWITCH_END(b->fake_stack, nullptr, nullptr);
}

static uint32_t next_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

template <class T> static void shuffle_order(std::vector<T> &items, uint32_t *state) {
    for (size_t i = items.size(); i > 1; i--) {
        std::swap(items[i - 1], items[next_random(state) % (uint32_t)i]);
    }
}

/* Every ready thread once, in the order of `turn`; false: none was ready. */
static bool run_round(block *b, const std::vector<int> &turn) {
    bool any = false;
    for (int i : turn) {
        if (b->lanes[(size_t)i].state != READY) continue;
        any = true;
        run_slice(b, i);
    }
    return any;
}

/* Only the first (or last) warp that can go on. */
static bool run_ahead(block *b, bool from_last) {
    int n_warps = (b->n + 31) / 32;
    for (int w = 0; w < n_warps; w++) {
        int warp = from_last ? n_warps - 1 - w : w;
        bool any = false;
        for (int i = warp * 32; i < std::min(b->n, warp * 32 + 32); i++) {
            if (b->lanes[(size_t)i].state != READY) continue;
            any = true;
            run_slice(b, i);
        }
        if (any) return true;
    }
    return false;
}

static void run_block(block *b, size_t shared_bytes, uint32_t *random) {
    int order = scheduling_order;
    b->n = b->n_live = (int)(b->size.x * b->size.y * b->size.z);
    b->n_arrived = b->n_true = 0;
    memset(b->warp_arrived, 0, sizeof b->warp_arrived);
    if (b->n < 1 || b->n > 1024) die("a block has 1 to 1024 threads");
    if ((int)b->lanes.size() < b->n) b->lanes.resize((size_t)b->n);
    /* A buffer of its own size every time: what is written past it is seen by ASan. */
    b->memory = std::vector<char>(shared_bytes, (char)0xff);
    b->objects.clear();
    std::vector<int> turn((size_t)b->n);
    for (int i = 0; i < b->n; i++) {
        prepare_lane(b, i);
        turn[(size_t)i] = order == 1 ? b->n - 1 - i : i;
    }
    while (b->n_live > 0) {
        if (order == 2) shuffle_order(turn, random);
        bool any = order >= 3 ? run_ahead(b, order == 4) : run_round(b, turn);
        if (!any) die("deadlock: a barrier or warp operation is not reached by all");
    }
}

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()> &kernel) {
    block *b = &own_block();
    current_block = b;
    b->grid = grid;
    b->size = size;
    b->kernel = &kernel;
    uint32_t random = scheduling_seed * 2654435761u + 1;
    size_t n = (size_t)grid.x * grid.y * grid.z;
    std::vector<uint32_t> blocks(n);
    for (size_t i = 0; i < n; i++) {
        bool down = scheduling_order == 1 || scheduling_order == 4;
        blocks[i] = (uint32_t)(down ? n - 1 - i : i);
    }
    if (scheduling_order == 2) shuffle_order(blocks, &random);
    for (uint32_t i : blocks) {
        b->index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
        run_block(b, shared_bytes, &random);
    }
}

} // namespace emulation
