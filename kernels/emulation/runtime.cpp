/* The emulated CUDA runtime: see cuda_runtime.h. */
#include "kernels/emulation/cuda_runtime.h"

#include <atomic>
#include <chrono>

#include "kernels/emulation/emulation.h"

namespace emulation {
void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()> &kernel);
}

struct emulated_graph {
    std::vector<std::function<void()>> nodes;
};

struct emulated_stream {
    bool capturing = false;
    emulated_graph captured;
};

struct emulated_event {
    std::chrono::steady_clock::time_point at;
};

static std::atomic<uint64_t> n_launches, n_replays;
static thread_local cudaError_t last_error;

enum { MAX_DEVICES = 8 };
static int n_devices = 1;
static int devices_mapped; /* as emulation_set_devices */
static std::atomic<bool> peer_enabled[MAX_DEVICES][MAX_DEVICES];
static thread_local int current_device;

extern "C" {

uint64_t emulation_launches(void) {
    return n_launches;
}
uint64_t emulation_replays(void) {
    return n_replays;
}

void emulation_set_devices(int n, int mapped) {
    n_devices = n < MAX_DEVICES ? n : MAX_DEVICES;
    devices_mapped = mapped;
    for (auto &row : peer_enabled) {
        for (auto &enabled : row) enabled = false;
    }
}

int emulation_peer_enabled(int from, int to) {
    return peer_enabled[from][to];
}

static cudaError_t fail(cudaError_t error) {
    last_error = error;
    return error;
}

/* Now, or as a node of the graph that the stream captures. */
static void execute(cudaStream_t stream, std::function<void()> work) {
    if (stream != nullptr && stream->capturing) {
        stream->captured.nodes.push_back(std::move(work));
        return;
    }
    work();
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorPeerAccessAlreadyEnabled: return "peer access is already enabled";
    }
    return "unknown error";
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) {
    return last_error;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = n_devices;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= n_devices) return fail(cudaErrorInvalidValue);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    if (device == peer || device >= n_devices || peer >= n_devices) return fail(cudaErrorInvalidValue);
    *can = devices_mapped != 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    bool wrong = flags != 0 || peer == current_device || peer >= n_devices || devices_mapped != 1;
    if (wrong) return fail(cudaErrorInvalidValue);
    bool again = peer_enabled[current_device][peer].exchange(true);
    return again ? fail(cudaErrorPeerAccessAlreadyEnabled) : cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    (void)device;
    *value = attribute == cudaDevAttrMultiProcessorCount       ? 4
             : attribute == cudaDevAttrComputeCapabilityMajor ? 8
                                                               : 0;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *free_bytes = *total_bytes = (size_t)2 << 30;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    return cudaSuccess;
}

/* Aligned as the device's allocator does, and poisoned: what nobody wrote is NaN. */
cudaError_t cudaMalloc(void **out, size_t bytes) {
    *out = aligned_alloc(256, (bytes + 255) / 256 * 256 + (bytes == 0 ? 256 : 0));
    if (*out == nullptr) return fail(cudaErrorMemoryAllocation);
    memset(*out, 0xff, bytes);
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
    (void)flags;
    return cudaMalloc(out, bytes);
}

cudaError_t cudaFreeHost(void *memory) {
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    (void)kind;
    execute(stream, [=] { memmove(to, from, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream) {
    (void)kind;
    execute(stream, [=] {
        for (size_t i = 0; i < height; i++) {
            memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
        }
    });
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream) {
    execute(stream, [=] { memset(memory, value, bytes); });
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    (void)flags;
    *out = new emulated_stream;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    bool capturing = stream != nullptr && stream->capturing;
    return capturing ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return cudaStreamSynchronize(stream);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    (void)stream;
    (void)event;
    (void)flags;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    (void)flags;
    *out = new emulated_event;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    (void)stream;
    event->at = std::chrono::steady_clock::now();
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    (void)event;
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    (void)event;
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    (void)mode;
    if (stream == nullptr || stream->capturing) return fail(cudaErrorInvalidValue);
    stream->capturing = true;
    stream->captured.nodes.clear();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!stream->capturing) return fail(cudaErrorInvalidValue);
    stream->capturing = false;
    *graph = new emulated_graph(std::move(stream->captured));
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                 unsigned long long flags) {
    (void)flags;
    *exec = new emulated_graph(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    if (stream != nullptr && stream->capturing) return fail(cudaErrorStreamCaptureUnsupported);
    n_replays++;
    for (const std::function<void()> &node : exec->nodes) node();
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}

} // extern "C"

static const size_t ANY_KERNELS_SHARED_BYTES = (48 << 10) - 512;
thread_local size_t emulation::allowed_shared_bytes = ANY_KERNELS_SHARED_BYTES;

void emulation::launch(dim3 grid, dim3 size, size_t shared_bytes, cudaStream_t stream,
                       std::function<void()> kernel) {
    /* What a device would refuse. */
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
        fprintf(stderr, "emulated device: grid %u,%u,%u\n", grid.x, grid.y, grid.z);
        abort();
    }
    if (shared_bytes > allowed_shared_bytes) {
        fprintf(stderr, "emulated device: %zu bytes of shared memory, %zu are allowed\n", shared_bytes,
                allowed_shared_bytes);
        abort();
    }
    allowed_shared_bytes = ANY_KERNELS_SHARED_BYTES;
    n_launches++;
    execute(stream, [=] { emulation::run_grid(grid, size, shared_bytes, kernel); });
}
