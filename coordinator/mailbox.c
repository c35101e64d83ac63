#include "coordinator/mailbox.h"

#include <stdlib.h>
#include <time.h>

#include "common/clock.h"
#include "common/error.h"

void mailbox_init(struct mailbox *mailbox, size_t n_max) {
    *mailbox = (struct mailbox){.n_max = n_max};
    mailbox->end = &mailbox->first;
    pthread_mutex_init(&mailbox->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&mailbox->filled, &attributes);
    pthread_condattr_destroy(&attributes);
}

void mailbox_fini(struct mailbox *mailbox) {
    CHECK(mailbox->first == NULL);
    pthread_cond_destroy(&mailbox->filled);
    pthread_mutex_destroy(&mailbox->lock);
}

static bool put(struct mailbox *mailbox, const struct event *event, size_t n_max) {
    struct event *copy = xmalloc(sizeof *copy);
    *copy = *event;
    copy->next = NULL;
    pthread_mutex_lock(&mailbox->lock);
    bool room = mailbox->n < n_max;
    bool was_empty = mailbox->first == NULL;
    if (room) {
        *mailbox->end = copy;
        mailbox->end = &copy->next;
        mailbox->n++;
    }
    pthread_mutex_unlock(&mailbox->lock);
    if (room && was_empty) pthread_cond_signal(&mailbox->filled);
    if (!room) free(copy);
    return room;
}

void mailbox_post(struct mailbox *mailbox, const struct event *event) {
    put(mailbox, event, SIZE_MAX);
}

bool mailbox_offer(struct mailbox *mailbox, const struct event *event) {
    return put(mailbox, event, mailbox->n_max);
}

struct event *mailbox_take(struct mailbox *mailbox, int64_t wait_ns) {
    int64_t until_ns = clock_now_ns() + wait_ns;
    struct timespec until = {until_ns / 1000000000, until_ns % 1000000000};
    pthread_mutex_lock(&mailbox->lock);
    while (mailbox->first == NULL) {
        if (pthread_cond_timedwait(&mailbox->filled, &mailbox->lock, &until) != 0) break;
    }
    struct event *all = mailbox->first;
    mailbox->first = NULL;
    mailbox->end = &mailbox->first;
    mailbox->n = 0;
    pthread_mutex_unlock(&mailbox->lock);
    return all;
}
