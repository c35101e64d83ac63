/* The CUDA runtime calls of worker/comm/comm_nccl.c. */
#include <stdlib.h>
#include <string.h>

#include "tests/doubles/nccl_double_streams.h"

cudaError_t cudaSetDevice(int device) {
    (void)device;
    return (cudaError_t)double_settings.device_code;
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
    if (double_settings.memory_code != 0) return (cudaError_t)double_settings.memory_code;
    *out = malloc(bytes);
    if (*out == NULL) abort();
    double_lock();
    double_counts.allocations++;
    double_unlock();
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    free(memory);
    double_lock();
    double_counts.allocations--;
    double_unlock();
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    (void)kind;
    if (double_settings.immediate) {
        memmove(to, from, bytes);
        return cudaSuccess;
    }
    double_lock();
    double_push(stream,
                &(struct double_task){.kind = DOUBLE_COPY, .to = to, .from = from, .bytes = bytes});
    double_unlock();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    (void)flags;
    *out = calloc(1, sizeof **out);
    if (*out == NULL) abort();
    double_lock();
    double_counts.events++;
    double_unlock();
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    double_lock();
    double_forget_event(event);
    double_counts.events--;
    double_unlock();
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    double_lock();
    event->recorded++;
    if (double_settings.immediate) {
        event->reached = event->recorded;
    } else {
        double_push(stream, &(struct double_task){
                                .kind = DOUBLE_EVENT, .event = event, .number = event->recorded});
    }
    double_unlock();
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (double_settings.on_query != NULL) double_settings.on_query();
    if (double_settings.query_code != 0) return (cudaError_t)double_settings.query_code;
    double_lock();
    double_progress();
    bool reached = event->reached == event->recorded;
    double_unlock();
    return reached ? cudaSuccess : cudaErrorNotReady;
}

const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorNoDevice           ? "no CUDA-capable device is detected"
           : error == cudaErrorMemoryAllocation ? "out of memory"
           : error == cudaErrorIllegalAddress   ? "an illegal memory access was encountered"
                                                : "another CUDA error";
}
