// The tensors of a directory: model.safetensors, or several files with an index.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "bitcore/io.h"

namespace bitmodels {

class Checkpoint {
 public:
  /// @param map Map the files; false: read them into memory.
  /// @throws FileError for files that are missing or damaged, an index that does not fit them.
  Checkpoint(const std::string& directory, bool map);

  /// @throws FileError that names a tensor which is missing.
  const bitcore::TensorEntry& take(const std::string& name);
  /// Null where it is missing.
  const bitcore::TensorEntry* find(const std::string& name) const;
  /// The file that a tensor lies in, which keeps it mapped.
  std::shared_ptr<const bitcore::SafetensorsFile> file_of(const std::string& name) const;
  const std::string& directory() const { return directory_; }
  /// Refuses tensors that nobody has taken; empty ones, which only stop other readers, do not count.
  /// @throws FileError
  void require_all_taken() const;

 private:
  void add(const std::string& path, bool map);
  void read_index(const std::string& directory, const std::string& index, bool map);

  std::string directory_;
  std::vector<std::shared_ptr<const bitcore::SafetensorsFile>> files_;
  std::map<std::string, std::size_t> places_;  // of tensors, by the file's number
  std::set<std::string> taken_;
};

}  // namespace bitmodels
