// Instructions of whole warps, against tables and products that are written from the figures of the PTX ISA.
#pragma once

#include <array>
#include <functional>
#include <random>

#include "kernel.h"
#include "scalar_test.h"

namespace ptx_test {

inline std::string registers(const std::string& prefix, int first, int count) {
  std::string text = "{";
  for (int i = first; i < first + count; ++i) text += (i > first ? ", " : "") + prefix + std::to_string(i);
  return text + "}";
}

// ---- mma ------------------------------------------------------------------------------------------------------------

struct Place {
  int row, column;
};
using PlaceOf = std::function<Place(int group, int member, int i)>;  // of the i-th element that a lane holds

// "Matrix Fragments for mma.m16n8k16 with floating point type", element by element as the ISA lists them.
inline Place a_of_k16(int group, int member, int i) {
  return {i < 2 || (i >= 4 && i < 6) ? group : group + 8, i < 4 ? member * 2 + (i & 1) : member * 2 + (i & 1) + 8};
}
inline Place b_of_k16(int group, int member, int i) {
  return {i < 2 ? member * 2 + (i & 1) : member * 2 + (i & 1) + 8, group};
}
// "Matrix Fragments for mma.m16n8k8": .f16 and .bf16, then .tf32.
inline Place a_of_k8(int group, int member, int i) { return {i < 2 ? group : group + 8, member * 2 + (i & 1)}; }
inline Place b_of_k8(int group, int member, int i) { return {member * 2 + i, group}; }
inline Place a_of_tf32_k8(int group, int member, int i) {
  return {i == 0 || i == 2 ? group : group + 8, i < 2 ? member : member + 4};
}
inline Place b_of_tf32_k8(int group, int member, int i) { return {i == 0 ? member : member + 4, group}; }
// "Matrix Fragments for mma.m16n8k4".
inline Place a_of_tf32_k4(int group, int member, int i) { return {i == 0 ? group : group + 8, member}; }
inline Place b_of_tf32_k4(int group, int member, int) { return {member, group}; }
// c and d of all of them.
inline Place c_of_all(int group, int member, int i) { return {i < 2 ? group : group + 8, member * 2 + (i & 1)}; }

// T: the type of an element, of which a register holds 4 / sizeof(T).
template <class T>
void test_mma(const std::string& opcode, int depth, const PlaceOf& place_a, const PlaceOf& place_b) {
  tested.insert(opcode);
  std::mt19937 random(std::hash<std::string>()(opcode));
  std::uniform_real_distribution<float> uniform(-1, 1);
  const auto element = [&]() -> T {
    if constexpr (kIsSmall<T>) {
      return T::of(uniform(random));
    } else {
      float value = uniform(random);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits &= ~uint32_t{0x1fff};
      std::memcpy(&value, &bits, 4);
      return value;
    }
  };
  std::vector<std::vector<T>> a(16, std::vector<T>(depth)), b(depth, std::vector<T>(8));
  std::vector<std::vector<float>> c(16, std::vector<float>(8));
  for (auto& row : a) std::generate(row.begin(), row.end(), element);
  for (auto& row : b) std::generate(row.begin(), row.end(), element);
  for (auto& row : c) std::generate(row.begin(), row.end(), [&] { return uniform(random); });

  const int in_a = 16 * depth / 32, in_b = depth * 8 / 32, per = 4 / static_cast<int>(sizeof(T));  // of a lane
  const int total = in_a / per + in_b / per + 4;                                                   // registers
  std::vector<uint32_t> in(static_cast<size_t>(32 * total));
  for (int lane = 0; lane < 32; ++lane) {
    auto* const to = reinterpret_cast<unsigned char*>(&in[static_cast<size_t>(lane * total)]);
    const auto put = [&](int at, const auto& value) { std::memcpy(to + at, &value, sizeof(value)); };
    for (int i = 0; i < in_a; ++i) {
      const Place p = place_a(lane >> 2, lane % 4, i);
      put(i * static_cast<int>(sizeof(T)), a[p.row][p.column]);
    }
    for (int i = 0; i < in_b; ++i) {
      const Place p = place_b(lane >> 2, lane % 4, i);
      put((in_a + i) * static_cast<int>(sizeof(T)), b[p.row][p.column]);
    }
    for (int i = 0; i < 4; ++i) {
      const Place p = c_of_all(lane >> 2, lane % 4, i);
      put(4 * (total - 4 + i), c[p.row][p.column]);
    }
  }
  std::string body = ".reg .b32 %v<" + std::to_string(total) + ">;\n.reg .b32 %d<4>;\n.reg .b64 %a, %b;\n";
  body += "mad.wide.u32 %a, %t, " + std::to_string(4 * total) + ", %in;\nmad.wide.u32 %b, %t, 16, %out;\n";
  for (int i = 0; i < total; ++i) {
    body += "ld.global.b32 %v" + std::to_string(i) + ", [%a+" + std::to_string(4 * i) + "];\n";
  }
  body += opcode + " {%d0, %d1, %d2, %d3}, " + registers("%v", 0, in_a / per) + ", " +
          registers("%v", in_a / per, in_b / per) + ", " + registers("%v", total - 4, 4) + ";\n" +
          "st.global.v4.b32 [%b], {%d0, %d1, %d2, %d3};";
  std::vector<float> out(32 * 4);
  const Result done = run(body, in, out);
  double error = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place p = c_of_all(lane >> 2, lane % 4, i);
      long double sum = c[p.row][p.column];
      for (int k = 0; k < depth; ++k)
        sum += static_cast<long double>(a[p.row][k]) * static_cast<long double>(b[k][p.column]);
      error = std::max(error, static_cast<double>(std::abs(out[lane * 4 + i] - sum)));
    }
  }
  check(done.error.empty() && error < 1e-6, opcode + ": " + done.error + " error " + std::to_string(error));
}

// ---- ldmatrix, stmatrix, movmatrix ----------------------------------------------------------------------------------

// Element (row, column) of matrix m in the tests: its place in memory, where rows lie 48 bytes apart.
inline uint16_t stored(int m, int row, int column) { return static_cast<uint16_t>(m * 1000 + row * 10 + column); }

inline void test_matrices(int count, bool transposed) {
  const std::string suffix = ".x" + std::to_string(count) + (transposed ? ".trans" : "") + ".shared.b16 ";
  const std::string name = "matrix.sync.aligned.m8n8" + suffix.substr(0, suffix.size() - 1);
  tested.insert("ld" + name);
  tested.insert("st" + name);
  // What a lane holds of matrix m: "each thread receives a fragment" of row lane / 4, elements 2 * (lane % 4) and the
  // next; .trans "loads in column-major format".
  const auto held = [&](int lane, int m) {
    const int row = lane / 4, column = lane % 4 * 2;
    const uint16_t low = transposed ? stored(m, column, row) : stored(m, row, column);
    const uint16_t high = transposed ? stored(m, column + 1, row) : stored(m, row, column + 1);
    return static_cast<uint32_t>(low | high << 16);
  };
  const std::string address = ".reg .b32 %v<4>, %at, %i;\n.reg .b64 %a;\nmul.lo.u32 %at, %t, 48;\n";
  // Lane l gives the address of row l % 8 of matrix l / 8. For ldmatrix each lane stores that row first.
  std::vector<uint16_t> rows(32 * 8);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) rows[lane * 8 + i] = stored(lane / 8, lane % 8, i);
  }
  std::vector<uint32_t> out(32 * 4);
  Result done = run(
      address +
          "mad.wide.u32 %a, %t, 16, %in;\nld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%a];\n"
          "st.shared.v4.b32 [%at], {%v0, %v1, %v2, %v3};\nbar.warp.sync -1;\n" +
          "ldmatrix.sync.aligned.m8n8" + suffix + registers("%v", 0, count) + ", [%at];\n" +
          "mad.wide.u32 %a, %t, 16, %out;\nst.global.v4.b32 [%a], {%v0, %v1, %v2, %v3};",
      rows, out, 32, 32 * 48);
  bool right = done.error.empty();
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < count; ++m) right = right && out[lane * 4 + m] == held(lane, m);
  }
  check(right, "ldmatrix" + suffix + done.error);

  std::vector<uint32_t> fragments(32 * 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) fragments[lane * 4 + m] = held(lane, m);
  }
  std::vector<uint16_t> stored_rows(32 * 8);
  done = run(
      address +
          "mad.wide.u32 %a, %t, 16, %in;\nld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%a];\n"
          "stmatrix.sync.aligned.m8n8" +
          suffix + "[%at], " + registers("%v", 0, count) +
          ";\nbar.warp.sync -1;\n"
          ".reg .pred %p;\nsetp.lt.u32 %p, %t, " +
          std::to_string(8 * count) +
          ";\n"
          "@%p ld.shared.v4.b32 {%v0, %v1, %v2, %v3}, [%at];\n"
          "mad.wide.u32 %a, %t, 16, %out;\n@%p st.global.v4.b32 [%a], {%v0, %v1, %v2, %v3};",
      fragments, stored_rows, 32, 32 * 48);
  check(done.error.empty() && std::equal(rows.begin(), rows.begin() + count * 64, stored_rows.begin()),
        "stmatrix" + suffix + done.error);
}

inline void test_movmatrix() {
  tested.insert("movmatrix.sync.aligned.m8n8.trans.b16");
  std::vector<uint32_t> in(32), out(32);
  for (int lane = 0; lane < 32; ++lane) {
    in[lane] = stored(0, lane / 4, lane % 4 * 2) | stored(0, lane / 4, lane % 4 * 2 + 1) << 16;
  }
  const Result done =
      run(".reg .b32 %v, %d;\n.reg .b64 %a, %b;\nmad.wide.u32 %a, %t, 4, %in;\nmad.wide.u32 %b, %t, 4, %out;\n"
          "ld.global.b32 %v, [%a];\nmovmatrix.sync.aligned.m8n8.trans.b16 %d, %v;\nst.global.b32 [%b], %d;",
          in, out);
  bool right = done.error.empty();
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    right = right && out[lane] == static_cast<uint32_t>(stored(0, column, row) | stored(0, column + 1, row) << 16);
  }
  check(right, "movmatrix " + done.error);
}

// ---- shfl, vote, redux ----------------------------------------------------------------------------------------------

// An instruction that makes %d of %v, %i and the predicate %p, with each lane's own of the first two.
inline std::vector<uint32_t> exchanged(const std::string& instruction, const std::vector<uint32_t>& values,
                                       const std::vector<uint32_t>& lanes) {
  std::vector<uint32_t> in, out(32);
  for (int lane = 0; lane < 32; ++lane) in.insert(in.end(), {values[lane], lanes[lane]});
  const std::string opcode = instruction.substr(0, instruction.find(' '));
  tested.insert(opcode);
  const Result done =
      run(".reg .b32 %v, %i, %d;\n.reg .pred %p, %q;\n.reg .b64 %a, %b;\nmad.wide.u32 %a, %t, 8, %in;\n"
          "mad.wide.u32 %b, %t, 4, %out;\nld.global.v2.b32 {%v, %i}, [%a];\nsetp.ne.u32 %p, %v, 0;\n" +
              instruction + "\nst.global.b32 [%b], %d;",
          in, out);
  check(done.error.empty(), opcode + ": " + done.error);
  return out;
}

inline void test_exchange() {
  std::mt19937 random(1);
  std::vector<uint32_t> values(32), lanes(32), same_lane(32, 3), few(32, 0), none(32, 0);
  for (int lane = 0; lane < 32; ++lane) values[lane] = random(), lanes[lane] = random() % 32;
  few[5] = few[9] = 7;
  // As CUDA's __shfl functions are described: segments of `width` lanes, and who asks beyond its own gets its own
  // value.
  for (int width : {32, 8}) {
    const std::string up = std::to_string((32 - width) << 8), others = std::to_string((32 - width) << 8 | 31);
    const auto got_idx = exchanged("shfl.sync.idx.b32 %d, %v, %i, " + others + ", -1;", values, lanes);
    const auto got_up = exchanged("shfl.sync.up.b32 %d|%q, %v, %i, " + up + ", -1;", values, same_lane);
    const auto got_down = exchanged("shfl.sync.down.b32 %d, %v, %i, " + others + ", 0xffffffff;", values, same_lane);
    const auto got_bfly = exchanged("shfl.sync.bfly.b32 %d, %v, %i, " + others + ", -1;", values, same_lane);
    for (int lane = 0; lane < 32; ++lane) {
      const int first = lane / width * width, place = lane % width;
      check(got_idx[lane] == values[first + static_cast<int>(lanes[lane]) % width], "shfl.idx");
      check(got_up[lane] == values[place >= 3 ? lane - 3 : lane], "shfl.up");
      check(got_down[lane] == values[place + 3 < width ? lane + 3 : lane], "shfl.down");
      check(got_bfly[lane] == values[lane ^ 3], "shfl.bfly");
    }
  }
  const auto all_same = [](const std::vector<uint32_t>& got, uint32_t expected, const char* what) {
    check(std::all_of(got.begin(), got.end(), [=](uint32_t one) { return one == expected; }), what);
  };
  const std::string as_number = " selp.b32 %d, 1, 0, %q;";
  all_same(exchanged("vote.sync.ballot.b32 %d, %p, -1;", few, lanes), 1u << 5 | 1u << 9, "vote.ballot");
  all_same(exchanged("vote.sync.any.pred %q, %p, -1;" + as_number, few, lanes), 1, "vote.any");
  all_same(exchanged("vote.sync.all.pred %q, %p, -1;" + as_number, few, lanes), 0, "vote.all");
  all_same(exchanged("vote.sync.all.pred %q, !%p, -1;" + as_number, none, lanes), 1, "vote.all of a negated predicate");
  all_same(exchanged("vote.sync.uni.pred %q, %p, -1;" + as_number, none, lanes), 1, "vote.uni");
  all_same(exchanged("vote.sync.uni.pred %q, %p, -1;" + as_number, few, lanes), 0, "vote.uni");
  all_same(exchanged("activemask.b32 %d;", few, lanes), 0xffffffffu, "activemask");
  uint32_t sum = 0, ands = ~0u, ors = 0, xors = 0, least = ~0u, most = 0;
  int32_t least_signed = INT32_MAX, most_signed = INT32_MIN;
  for (uint32_t value : values) {
    sum += value, ands &= value, ors |= value, xors ^= value,
        least = std::min(least, value), most = std::max(most, value);
    least_signed = std::min(least_signed, static_cast<int32_t>(value));
    most_signed = std::max(most_signed, static_cast<int32_t>(value));
  }
  const auto redux = [&](const std::string& name, uint32_t expected) {
    all_same(exchanged("redux.sync." + name + " %d, %v, -1;", values, lanes), expected, name.c_str());
  };
  redux("add.u32", sum);
  redux("add.s32", sum);
  redux("and.b32", ands);
  redux("or.b32", ors);
  redux("xor.b32", xors);
  redux("min.u32", least);
  redux("max.u32", most);
  redux("min.s32", static_cast<uint32_t>(least_signed));
  redux("max.s32", static_cast<uint32_t>(most_signed));
}

inline void test_warp() {
  const auto name = [](const std::string& shape, const std::string& type) {
    return "mma.sync.aligned." + shape + ".row.col.f32." + type + "." + type + ".f32";
  };
  test_mma<F16>(name("m16n8k16", "f16"), 16, a_of_k16, b_of_k16);
  test_mma<BF16>(name("m16n8k16", "bf16"), 16, a_of_k16, b_of_k16);
  test_mma<F16>(name("m16n8k8", "f16"), 8, a_of_k8, b_of_k8);
  test_mma<BF16>(name("m16n8k8", "bf16"), 8, a_of_k8, b_of_k8);
  test_mma<float>(name("m16n8k8", "tf32"), 8, a_of_tf32_k8, b_of_tf32_k8);
  test_mma<float>(name("m16n8k4", "tf32"), 4, a_of_tf32_k4, b_of_tf32_k4);
  for (int count : {1, 2, 4}) {
    test_matrices(count, false);
    test_matrices(count, true);
  }
  test_movmatrix();
  test_exchange();
}

}  // namespace ptx_test
