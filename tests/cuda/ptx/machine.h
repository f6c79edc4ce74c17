// Runs a kernel, one block after another. Warps take turns at random, and so do the parts of a divided warp: whatever a
// program relies on beyond its barriers fails for some seed. What no order would show, such as a race, is an error of
// its own (memory.h).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "decode.h"
#include "warp.h"

namespace ptx {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// The lanes of a warp by where they are. Lanes that part at a branch become two groups, which wait for each other where
// they join again.
class Divergence {
 public:
  struct Group {
    int pc;
    uint32_t lanes;
    int join;  // index of the Join that it is on its way to; -1 for none
  };

  void start() {
    groups = {{0, kAllLanes, -1}};
    joins_.clear();
    unused_.clear();
    live = kAllLanes;
  }

  // Sends the lanes `taken` of a group to a branch's target, and the others on. The group's place in `groups` is
  // theirs.
  void branch(size_t i, uint32_t taken, const Instruction& x) {
    Group& group = groups[i];
    const uint32_t others = group.lanes & ~taken;
    if (taken == 0) {
      ++group.pc;
    } else if (others == 0) {
      group.pc = x.target;
    } else {
      int join = group.join;
      if (x.join >= 0 && (join < 0 || joins_[join].pc != x.join)) join = new_join({x.join, group.lanes, 0, group.join});
      const int next = group.pc + 1;
      group = {x.target, taken, join};
      groups.push_back({next, others, join});
    }
  }

  bool is_at_join(const Group& group) const { return group.join >= 0 && joins_[group.join].pc == group.pc; }
  void arrive(size_t i) {
    const Group group = remove(i);
    joins_[group.join].arrived |= group.lanes;
    close(group.join);
  }
  // Ends some lanes of a group: nobody waits for them any more.
  void exit(size_t i, uint32_t ended) {
    live &= ~ended;
    const int join = groups[i].join;
    for (int j = join; j >= 0; j = joins_[j].outer) joins_[j].expected &= ~ended;
    groups[i].lanes &= ~ended;
    if (groups[i].lanes) {
      ++groups[i].pc;
    } else {
      remove(i);
      close(join);
    }
  }

  std::vector<Group> groups;
  uint32_t live = 0;

 private:
  struct Join {
    int pc;
    uint32_t expected, arrived;
    int outer;  // the join that its lanes go on to
  };

  int new_join(const Join& join) {
    if (unused_.empty()) {
      joins_.push_back(join);
      return static_cast<int>(joins_.size()) - 1;
    }
    const int place = unused_.back();
    unused_.pop_back();
    joins_[place] = join;
    return place;
  }
  Group remove(size_t i) {
    const Group group = groups[i];
    groups[i] = groups.back();
    groups.pop_back();
    return group;
  }
  // Makes a group of a join's lanes once they are all there. It may be at its next join already.
  void close(int j) {
    while (j >= 0 && joins_[j].arrived == joins_[j].expected) {
      const Join join = joins_[j];
      unused_.push_back(j);
      if (join.expected && (join.outer < 0 || joins_[join.outer].pc != join.pc)) {
        groups.push_back({join.pc, join.expected, join.outer});
        return;
      }
      if (join.outer >= 0) joins_[join.outer].arrived |= join.expected;
      j = join.outer;
    }
  }

  std::vector<Join> joins_;
  std::vector<int> unused_;
};

class Machine {
 public:
  Machine(const Kernel& kernel, uint64_t seed) : counts(kernel.code.size()), kernel_(kernel), random_(seed) {}

  // `parameters` is laid out as the kernel's are. Shared memory is what the launch asks for, beside the kernel's own.
  void launch(Grid grid, int threads, int64_t shared_bytes, const void* parameters) {
    if (threads % kLanes || threads <= 0 || threads > 1024)
      throw Error("a block of " + std::to_string(threads) + " threads");
    if (kernel_.max_threads && threads > kernel_.max_threads) throw Error("more threads than the kernel is made for");
    grid_ = grid;
    SharedMemory shared(kernel_.static_shared_bytes + shared_bytes);
    runners_.clear();
    for (int i = 0; i < threads / kLanes; ++i) {
      runners_.push_back(
          {Warp(kernel_, i, shared, global, static_cast<const unsigned char*>(parameters)), {}, nullptr});
      runners_.back().warp.now = &now_;
    }
    for (int64_t z = 0; z < grid.z; ++z) {
      for (int64_t y = 0; y < grid.y; ++y) {
        for (int64_t x = 0; x < grid.x; ++x) {
          block_ = {x, y, z};
          shared.reset();
          run_block();
        }
      }
    }
  }

  // The sums of all launches, by opcode.
  std::map<std::string, Count> counts_by_opcode() const {
    std::map<std::string, Count> sums;
    for (size_t i = 0; i < counts.size(); ++i) {
      if (counts[i].executed) sums[kernel_.code[i].opcode].add(counts[i]);
    }
    return sums;
  }

  GlobalMemory global;
  std::vector<Count> counts;  // by instruction

 private:
  struct Runner {  // a warp, and where it is
    Warp warp;
    Divergence divergence;
    const Instruction* barrier = nullptr;  // the one that it waits at
  };
  struct Barrier {
    int warps = 0;  // how many there are to be; 0 while none has arrived
    std::vector<size_t> arrived;
    int lanes = 0, votes = 0;  // of bar.red: those whose predicate is true
  };

  void run_block() {
    const int warps = static_cast<int>(runners_.size());
    barriers_ = {};
    now_ = 1;
    for (Runner& runner : runners_) {
      runner.warp.start(kernel_, warps);
      runner.divergence.start();
      set_specials(runner.warp, warps);
    }
    std::vector<size_t> ready;
    while (true) {
      ready.clear();
      for (size_t i = 0; i < runners_.size(); ++i) {
        if (runners_[i].divergence.live && !runners_[i].barrier) ready.push_back(i);
      }
      if (ready.empty()) break;
      take_turn(runners_[ready[random_() % ready.size()]]);
    }
    for (const Runner& runner : runners_) {
      if (runner.barrier) throw Error(where(runner) + "a barrier that not all threads reach");
      for (const Copies& copies : runner.warp.copies) {
        if (!copies.open.empty()) throw Error(where(runner) + "ended with copies that were never committed");
      }
    }
  }

  void set_specials(Warp& warp, int warps) {
    const auto number = [](int64_t n) { return static_cast<uint32_t>(n); };
    for (const auto& [special, at] : kernel_.specials) {
      for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t& to = warp.special(at)[lane];
        switch (special) {
          case Special::tid_x: to = number(warp.index * kLanes + lane); break;
          case Special::ntid_x: to = number(warps * kLanes); break;
          case Special::ctaid_x: to = number(block_.x); break;
          case Special::ctaid_y: to = number(block_.y); break;
          case Special::ctaid_z: to = number(block_.z); break;
          case Special::nctaid_x: to = number(grid_.x); break;
          case Special::nctaid_y: to = number(grid_.y); break;
          case Special::nctaid_z: to = number(grid_.z); break;
          case Special::laneid: to = number(lane); break;
          case Special::warpid: to = number(warp.index); break;
          case Special::tid_y:
          case Special::tid_z: to = 0; break;  // blocks have one dimension here
          case Special::ntid_y:
          case Special::ntid_z: to = 1;
        }
      }
    }
  }

  // Runs a group of a warp's lanes for some instructions, or until it waits or ends.
  void take_turn(Runner& runner) {
    constexpr uint64_t kMostSteps = 64;
    Divergence& divergence = runner.divergence;
    const size_t i = divergence.groups.size() == 1 ? 0 : random_() % divergence.groups.size();
    const Instruction* x = nullptr;
    try {
      for (uint64_t steps = random_() % kMostSteps + 1; steps > 0; --steps) {
        Divergence::Group& group = divergence.groups[i];
        if (divergence.is_at_join(group)) return divergence.arrive(i);
        x = &kernel_.code.at(static_cast<size_t>(group.pc));
        Count& count = counts[static_cast<size_t>(group.pc)];
        ++count.executed;
        uint32_t lanes = group.lanes;
        if (x->guard >= 0) lanes &= runner.warp.predicates[x->guard] ^ (x->guard_negated ? kAllLanes : 0);
        switch (x->flow) {
          case Instruction::Flow::next:
            runner.warp.count = &count;
            if (lanes) x->execute(runner.warp, *x, lanes);
            ++group.pc;
            break;
          case Instruction::Flow::branch: divergence.branch(i, lanes, *x); break;
          case Instruction::Flow::exit:
            divergence.exit(i, lanes);
            if (lanes) return;
            break;
          case Instruction::Flow::warp_barrier:
            ++group.pc;
            if (lanes) wait_for_warp(runner, lanes, *x);
            break;
          case Instruction::Flow::barrier:
            ++group.pc;
            if (lanes) return wait_for_block(runner, lanes, *x);
        }
      }
    } catch (const Error& error) {
      throw Error(where(runner) + error.what() + (x ? ", line " + std::to_string(x->line) + ": " + x->text : ""));
    }
  }

  std::string where(const Runner& runner) const {
    return "block " + std::to_string(block_.x) + ", warp " + std::to_string(runner.warp.index) + ": ";
  }

  // bar.warp.sync: what the lanes did is ordered before what they do next.
  void wait_for_warp(Runner& runner, uint32_t lanes, const Instruction& x) {
    const uint32_t members = runner.warp.row<uint32_t>(x.operands[0])[__builtin_ctz(lanes)];
    require_whole(lanes, members & runner.divergence.live);
    runner.warp.seen[runner.warp.index] = ++now_;
  }

  // bar.sync number {, threads}; bar.red.
  void wait_for_block(Runner& runner, uint32_t lanes, const Instruction& x) {
    require_whole(lanes, runner.divergence.live);
    runner.barrier = &x;
    Barrier& barrier = barriers_.at(x.operands.at(0).number);
    const bool says_threads = x.operands.size() == (x.poll == Poll::none ? 2 : 4);
    const int warps = static_cast<int>(says_threads ? x.operands[1].number / kLanes : runners_.size());
    if (barrier.warps && barrier.warps != warps) throw Error("a barrier of another number of threads");
    barrier.warps = warps;
    barrier.arrived.push_back(static_cast<size_t>(runner.warp.index));
    barrier.lanes += __builtin_popcount(lanes);
    if (x.poll != Poll::none) barrier.votes += __builtin_popcount(runner.warp.mask(*(x.operands.end() - 2)) & lanes);
    if (static_cast<int>(barrier.arrived.size()) < warps) return;
    // What any of them did, or had been told of, is ordered before what they do next.
    std::vector<uint32_t> seen(runners_.size());
    for (size_t one : barrier.arrived) {
      for (size_t i = 0; i < seen.size(); ++i) seen[i] = std::max(seen[i], runners_[one].warp.seen[i]);
    }
    ++now_;
    for (size_t one : barrier.arrived) seen[one] = now_;
    for (size_t one : barrier.arrived) {
      runners_[one].warp.seen = seen;
      tell(runners_[one], barrier);
      runners_[one].barrier = nullptr;
    }
    barrier = {};
  }

  static void tell(Runner& runner, const Barrier& barrier) {
    const Operand& to = runner.barrier->operands.back();
    const uint32_t lanes = runner.divergence.live;
    const bool any = barrier.votes > 0, all = barrier.votes == barrier.lanes;
    switch (runner.barrier->poll) {
      case Poll::none: break;
      case Poll::any: runner.warp.set_mask(to, lanes, any ? kAllLanes : 0); break;
      case Poll::all: runner.warp.set_mask(to, lanes, all ? kAllLanes : 0); break;
      case Poll::number:
        for_each_lane(lanes, [&](int lane) { runner.warp.set_value(to, lane, static_cast<uint64_t>(barrier.votes)); });
    }
  }

  const Kernel& kernel_;
  std::mt19937_64 random_;
  Grid grid_, block_;
  std::vector<Runner> runners_;
  std::array<Barrier, 16> barriers_;
  uint32_t now_ = 0;  // see Observer
};

}  // namespace ptx
