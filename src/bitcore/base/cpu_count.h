// How many CPUs this process may use.
#pragma once

#include <string>

namespace bitcore {

/// Those of the affinity mask, no more than the control group's quota of CPU time is worth; at least 1.
int usable_cpus();

/// CPUs that the quotas of this process's control group, and of those that it lies in, are worth; infinity without one.
/// @param groups The process's groups: /proc/self/cgroup.
/// @param root   Where control groups are mounted: /sys/fs/cgroup.
double cpus_of_control_group(const std::string& groups, const std::string& root);

}  // namespace bitcore
