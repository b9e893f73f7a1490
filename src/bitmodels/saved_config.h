// What a saved model is besides its tensors, as text by key: "n_layers": "3", "quant_config.activation_dtype": "int8",
// "layers.1.quant_config.activation_dtype": "float32" of a layer with a config of its own, "tied.layers.2.weight":
// "layers.1.weight" of a tensor that is stored under another's name. The metadata of model.safetensors hold it like
// this; a config.json is brought into this form.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "bitcore/config.h"
#include "bitmodels/mlp.h"

namespace bitmodels {

using Fields = std::map<std::string, std::string, std::less<>>;

/// Fields that a file may lack, with the values that they then have.
Fields default_fields();

/// The fields of a config.json, defaults included.
/// @throws FileError for what is no JSON object of fields that a BitMLPModel has.
Fields read_config_json(const std::string& path);

/// A model's metadata must not contradict the config.json beside them; files by other hands may have none.
/// @throws FileError that names the field and both values.
void check_metadata(const Fields& metadata, const std::string& metadata_path, const Fields& config,
                    const std::string& config_path);

/// The fields, checked and parsed. `path` in messages: the file that they come from.
class SavedConfig {
 public:
  /// @throws FileError where a field is missing, or is not what it should be.
  SavedConfig(Fields fields, std::string path);

  const BitMLPConfig& config() const { return config_; }
  /// Of `layers.<index>`.
  bitcore::BitQuantConfig layer_config(std::int64_t index) const;
  /// The name under which the file stores a tensor.
  const std::string& stored_name(const std::string& tensor) const;
  /// The tensors that are stored under another's name.
  std::vector<std::string> tied_names() const;

 private:
  const std::string& text(const std::string& name) const;
  std::int64_t count(const std::string& name) const;
  double dropout() const;
  bool flag(const std::string& name) const;
  bitcore::BitQuantConfig quant_config(const std::string& prefix) const;
  void check_layer_names() const;

  Fields fields_;
  std::string path_;
  BitMLPConfig config_;
};

}  // namespace bitmodels
