#include "second/second.h"

int second() { return first() + 1; }
