/* Files that were built or installed together with this program. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

/* The path of `file` in the program's folder, or in ../bin or ../lib/tandem of it. False: in none of them, or
 * its path is longer than size. */
bool beside_program(char *out, size_t size, const char *file);
