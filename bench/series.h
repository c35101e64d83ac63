/* Medians over passes, for every bench. */
#pragma once

enum { SERIES_MAX = 64 };

struct series {
    double values[SERIES_MAX];
    int n;
};

void series_add(struct series *series, double value); /* past SERIES_MAX: ignored */
double series_median(struct series *series);          /* NaN when empty; sorts */
