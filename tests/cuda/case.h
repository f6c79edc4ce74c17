// A test case: a unit, and how to run it, as `key=value` pairs of a line.
#pragma once

#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

#include "planner.h"

namespace shufflenet::cuda {

struct Case {
  explicit Case(const std::string& line) {
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      const size_t equals = word.find('=');
      if (equals == std::string::npos) throw std::runtime_error("not key=value: " + word);
      values[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }
  std::string text(const std::string& key, const std::string& otherwise) const {
    const auto found = values.find(key);
    return found == values.end() ? otherwise : found->second;
  }
  int64_t number(const std::string& key, int64_t otherwise) const {
    return std::stoll(text(key, std::to_string(otherwise)));
  }

  Unit unit() const {
    Unit unit;
    unit.batch = number("n", 1);
    unit.in_channels = number("in", 12);
    unit.height = number("h", 5);
    unit.width = number("w", 5);
    unit.mid_channels = number("mid", 6);
    unit.out_channels = number("out", 12);
    unit.conv1_groups = number("g1", 3);
    unit.groups = number("g", 3);
    unit.shuffle_groups = number("sg", unit.groups);
    unit.shortcut_first = number("first", 0);
    unit.shortcut_relu = number("shortcut_relu", 1);
    unit.stride = number("stride", 1);
    unit.conv2_relu = number("relu", 0);
    unit.pool_count_include_pad = number("pad", 1);
    unit.layout = text("layout", "nchw") == "nhwc" ? Layout::channels_last : Layout::contiguous;
    return unit;
  }
  Dtype dtype() const {
    static const std::map<std::string, Dtype> dtypes = {
        {"float32", Dtype::float32},
        {"float64", Dtype::float64},
        {"bfloat16", Dtype::bfloat16},
        {"float16", Dtype::float16},
        {"tfloat32", Dtype::tfloat32}};
    return dtypes.at(text("dtype", "float32"));
  }
  Device device() const { return device_of(static_cast<int>(number("sm", 90))); }

  std::map<std::string, std::string> values;
};

}  // namespace shufflenet::cuda
