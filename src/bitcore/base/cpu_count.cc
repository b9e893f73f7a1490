#include "bitcore/base/cpu_count.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace bitcore {
namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();

int cpus_of_affinity_mask() {
#ifdef __linux__
  // The kernel refuses a mask that is smaller than its own, which may be larger than cpu_set_t.
  for (int most = CPU_SETSIZE; most <= (1 << 16); most *= 2) {
    std::vector<cpu_set_t> mask(static_cast<std::size_t>(most / CPU_SETSIZE));
    const std::size_t bytes = mask.size() * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, mask.data()) == 0) return CPU_COUNT_S(bytes, mask.data());
  }
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

// CPUs that the quota of one control group is worth. Version 2: "max 100000" or "150000 100000" in one file.
double quota_v2(const std::string& directory) {
  std::ifstream file(directory + "/cpu.max");
  double quota = 0, period = 0;
  return file >> quota >> period && quota > 0 && period > 0 ? quota / period : kNoLimit;
}

// Version 1: two files; a quota of -1 stands for none.
double quota_v1(const std::string& directory) {
  std::ifstream quota_file(directory + "/cpu.cfs_quota_us"), period_file(directory + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  return quota_file >> quota && period_file >> period && quota > 0 && period > 0 ? quota / period : kNoLimit;
}

// The least quota of a group and of those that it lies in. A container may see its group's path on the host, which it
// does not have: its own group is then the root of what it sees.
double least_quota(double (*quota)(const std::string&), const std::string& root, std::string path) {
  double least = quota(root);
  for (; path.size() > 1; path.resize(path.rfind('/'))) least = std::min(least, quota(root + path));
  return least;
}

}  // namespace

// Lines are "0::PATH" for version 2 and "ID:cpu,cpuacct:PATH" for version 1.
double cpus_of_control_group(const std::string& groups, const std::string& root) {
  double least = kNoLimit;
  std::ifstream file(groups);
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos || line.find('/', second) != second + 1) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",",
                      path = line.substr(second + 1);
    if (controllers == ",,") least = std::min(least, least_quota(quota_v2, root, path));
    if (controllers.find(",cpu,") != std::string::npos) {
      least = std::min(least, least_quota(quota_v1, root + "/cpu", path));
    }
  }
  return least;
}

int usable_cpus() {
  const double cpus = std::min<double>(cpus_of_affinity_mask(),
                                       std::ceil(cpus_of_control_group("/proc/self/cgroup", "/sys/fs/cgroup")));
  return std::max(1, static_cast<int>(cpus));
}

}  // namespace bitcore
