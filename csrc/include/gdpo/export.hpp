/// GDPO_API marks what a shared library exports; everything else is hidden.
#pragma once

#if defined(__GNUC__)
#define GDPO_API __attribute__((visibility("default")))
#define GDPO_HIDDEN __attribute__((visibility("hidden")))
#else
#define GDPO_API
#define GDPO_HIDDEN
#endif
