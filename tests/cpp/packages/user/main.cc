#include "second/second.h"

int main() { return first() == 1 && second() == 2 ? 0 : 1; }
