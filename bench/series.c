#include "bench/series.h"

#include <math.h>
#include <stdlib.h>

void series_add(struct series *series, double value) {
    if (series->n < SERIES_MAX) series->values[series->n++] = value;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double series_median(struct series *series) {
    if (series->n == 0) return NAN;
    qsort(series->values, (size_t)series->n, sizeof *series->values, compare);
    int middle = series->n / 2;
    return series->n % 2 ? series->values[middle]
                         : (series->values[middle - 1] + series->values[middle]) / 2;
}
