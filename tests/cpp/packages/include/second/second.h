#pragma once

#include "first/first.h"

int second();
