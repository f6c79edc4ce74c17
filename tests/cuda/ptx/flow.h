// Where lanes that part at a branch meet again: at its immediate postdominator, the first instruction that all ways
// from the branch to the end of the kernel go through. A card's compiler lets them meet there too, and what it makes of
// .aligned instructions relies on it.
#pragma once

#include <algorithm>
#include <vector>

#include "instruction.h"

namespace ptx {

// Sets `join` of each branch that may divide a warp. Dominators of the reversed flow, by the algorithm of Cooper,
// Harvey and Kennedy ("A Simple, Fast Dominance Algorithm").
inline void find_joins(std::vector<Instruction>& code) {
  const int end = static_cast<int>(code.size());  // a node behind all instructions
  std::vector<std::vector<int>> next(end + 1), previous(end + 1);
  for (int i = 0; i < end; ++i) {
    const bool branches = code[i].flow == Instruction::Flow::branch, ends = code[i].flow == Instruction::Flow::exit;
    if (branches) next[i].push_back(code[i].target);
    if (ends) next[i].push_back(end);
    if ((!branches && !ends) || code[i].guard >= 0) next[i].push_back(i + 1);
    for (int to : next[i]) previous[to].push_back(i);
  }
  // A postorder of the nodes, from the end backwards.
  std::vector<int> order, number(end + 1, -1);
  std::vector<std::pair<int, size_t>> path = {{end, 0}};
  std::vector<bool> seen(end + 1);
  seen[end] = true;
  while (!path.empty()) {
    auto& [node, tried] = path.back();
    if (tried == previous[node].size()) {
      number[node] = static_cast<int>(order.size());
      order.push_back(node);
      path.pop_back();
      continue;
    }
    const int to = previous[node][tried++];
    if (!seen[to]) path.emplace_back(to, 0);
    seen[to] = true;
  }
  std::vector<int> postdominator(end + 1, -1);
  postdominator[end] = end;
  const auto common = [&](int a, int b) {
    while (a != b) {
      while (number[a] < number[b]) a = postdominator[a];
      while (number[b] < number[a]) b = postdominator[b];
    }
    return a;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (auto node = order.rbegin() + 1; node != order.rend(); ++node) {
      int found = -1;
      for (int to : next[*node]) {
        if (postdominator[to] >= 0) found = found < 0 ? to : common(found, to);
      }
      changed |= found != postdominator[*node];
      postdominator[*node] = found;
    }
  }
  for (int i = 0; i < end; ++i) {
    const bool divides = code[i].flow == Instruction::Flow::branch && code[i].guard >= 0;
    if (divides && postdominator[i] != end) code[i].join = postdominator[i];
  }
}

}  // namespace ptx
