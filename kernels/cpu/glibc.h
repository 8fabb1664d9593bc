// Included ahead of every file, so that a library built on a new system loads on one with glibc 2.28, the oldest that
// PyTorch serves: the versions of exp, log and pow from before 2.29 differ only in how they report errors, which no
// kernel asks for.
#pragma once

#if __has_include(<features.h>)
#include <features.h>
#endif

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver pow, pow@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17");
__asm__(".symver log, log@GLIBC_2.17");
__asm__(".symver pow, pow@GLIBC_2.17");
#endif
