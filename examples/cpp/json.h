// SPDX-License-Identifier: Apache-2.0
// As much of JSON as plan.json and the header of a safetensors file need: objects, arrays, strings, numbers, literals.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace json {

struct Value {
  std::string text;  // of a string, a number or a literal
  std::vector<Value> items;
  std::map<std::string, Value> members;

  const Value& at(const std::string& key) const {
    const auto found = members.find(key);
    if (found == members.end()) throw std::runtime_error("JSON: wanted a member '" + key + "'");
    return found->second;
  }

  double number() const { return std::strtod(text.c_str(), nullptr); }
  size_t size() const { return static_cast<size_t>(std::strtoull(text.c_str(), nullptr, 10)); }
  bool is(const char* literal) const { return text == literal; }
};

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Value value() {
    Value v;
    switch (peek()) {
      case '{':
        list('{', '}', [&] {
          const std::string key = string();
          expect(':');
          v.members[key] = value();
        });
        break;
      case '[': list('[', ']', [&] { v.items.push_back(value()); }); break;
      case '"': v.text = string(); break;
      default:
        while (at_ < text_.size() && std::string(",]} \n\r\t").find(text_[at_]) == std::string::npos)
          v.text += text_[at_++];
    }
    return v;
  }

 private:
  char peek() {
    at_ = text_.find_first_not_of(" \n\r\t", at_);
    if (at_ == std::string::npos) throw std::runtime_error("JSON: ends too early");
    return text_[at_];
  }

  void expect(char c) {
    if (peek() != c) throw std::runtime_error(std::string("JSON: wanted '") + c + "' at " + std::to_string(at_));
    ++at_;
  }

  template <class Item>
  void list(char open, char close, Item item) {
    expect(open);
    if (peek() != close) item();
    while (peek() != close) {
      expect(',');
      item();
    }
    expect(close);
  }

  // Escapes are kept as they are: no name that is looked up here has one.
  std::string string() {
    expect('"');
    std::string s;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') s += text_[at_++];
      s += text_.at(at_++);
    }
    expect('"');
    return s;
  }

  const std::string& text_;
  size_t at_ = 0;
};

inline Value parse(const std::string& text) { return Parser(text).value(); }

}  // namespace json
