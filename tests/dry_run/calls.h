// Every stand-in library counts the calls of its functions. Of those that are generated the assembly counts (build.py), the
// ones written by hand call `note`.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <string>

void note(const std::string &what, long times = 1);

// Copies between host and device; kinds are CANN's and CUDA's: 0 host to host, 1 to the device, 2 to the host, 3 on the device
void copy(void *to, const void *from, size_t bytes, int kind);

// Memory of the device: zeros, which take no room until they are written
void *device_memory(size_t bytes);

// Something that a pointer can point at
inline void *handle(size_t bytes = 64) { return calloc(1, bytes); }
