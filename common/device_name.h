/* The names of devices that option --device takes: auto, cpu, cuda, cuda:K, emulated. */
#pragma once
#include "common/error.h"

/* INVALID_ARGUMENT for another text, with what was expected. */
enum status device_name_check(const char *name, struct error *err);
/* K of "cuda:K", -1 for another name. */
int device_name_index(const char *name);
