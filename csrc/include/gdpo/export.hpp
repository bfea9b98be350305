/// GDPO_API marks what a shared library exports; everything else is hidden.
#pragma once

#if defined(__GNUC__)
#define GDPO_API __attribute__((visibility("default")))
#else
#define GDPO_API
#endif
