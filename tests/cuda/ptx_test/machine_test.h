// Memory, barriers, divided warps and counts; and that what a kernel must not do is noticed.
#pragma once

#include "kernel.h"
#include "scalar_test.h"

namespace ptx_test {

inline void expect_error(const std::string& part, const std::string& body, int threads = 32) {
  std::vector<uint32_t> in(64, 1), out(1024);
  for (uint64_t seed = 0; seed < 3; ++seed) {  // whatever the order
    const Result done =
        run(".reg .b32 %a, %b, %c;\n.reg .b64 %x;\n.reg .pred %p;\n" + body, in, out, threads, 4096, seed);
    check(done.error.find(part) != std::string::npos, "expected '" + part + "', got '" + done.error + "' of: " + body);
  }
}

inline void test_errors() {
  const std::string own = "shl.b32 %a, %t, 2;\n";  // a word for each thread
  const std::string mma =
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%a, %a, %a, %a}, {%b, %b}, {%b}, {%c, %c, %c, %c};";
  expect_error("an opcode that is not known, line 18: tanh.approx.f32 %a, %b", "tanh.approx.f32 %a, %b;");
  expect_error("not known", "wgmma.fence.sync.aligned;");
  expect_error("other operands", "add.s32 %a, %b;");
  expect_error("another type", "add.s64 %x, %a, %x;");
  // Shared memory.
  expect_error("never written", own + "ld.shared.b32 %b, [%a];");
  expect_error("outside", own + "st.shared.b32 [%a+4096], %b;");
  expect_error("outside", own + "st.shared.b32 [%a+-4], %b;");
  expect_error("not aligned", own + "st.shared.b32 [%a+2], %b;");
  expect_error("race: read", own + "st.shared.b32 [%a], %t;\nxor.b32 %a, %a, 4;\nld.shared.b32 %b, [%a];");
  expect_error("race: write", "st.shared.b32 [0], %t;");
  expect_error(
      "race: write",
      own +
          "st.shared.b32 [%a], %t;\nbar.sync 0;\nxor.b32 %b, %a, 4;\nld.shared.b32 %c, [%b];\nst.shared.b32 [%a], %c;");
  expect_error("race",
               own +
                   "st.shared.b32 [%a], %t;\nbar.sync 0;\nst.shared.b32 [%a], %t;\nbar.warp.sync -1;\nxor.b32 %b, %a, "
                   "128;\nld.shared.b32 %c, [%b];",
               64);
  // Global memory.
  expect_error("may not be written", "st.global.b32 [%in], %t;");
  expect_error("may not be read", "ld.global.b32 %a, [%out];");
  expect_error("in (256 bytes) + 256", "ld.global.b32 %a, [%in+256];");
  expect_error("in (256 bytes) + -4", "ld.global.b32 %a, [%in+-4];");
  expect_error("not aligned to 8", "ld.global.v2.b32 {%a, %b}, [%in+4];");
  expect_error("behind the parameters", "ld.param.b32 %a, [test_param_1+8];");
  // Asynchronous copies.
  const std::string copy = own + "cp.async.ca.shared.global [%a], [%in], 4;\n";
  expect_error("copy is filling", copy + "cp.async.commit_group;\nld.shared.b32 %b, [%a];");
  expect_error("copy is filling", copy + "cp.async.commit_group;\ncp.async.wait_group 1;\nld.shared.b32 %b, [%a];");
  expect_error("copy is filling", copy + "cp.async.wait_group 0;\nld.shared.b32 %b, [%a];");
  expect_error("never committed", copy);
  expect_error("a copy of this size", own + "cp.async.cg.shared.global [%a], [%in], 8;\n");
  expect_error(
      "race", copy + "cp.async.commit_group;\ncp.async.wait_group 0;\nxor.b32 %a, %a, 4;\nld.shared.b32 %b, [%a];");
  // Warps that are not whole, and barriers.
  const std::string half = "setp.lt.u32 %p, %t, 16;\n";
  expect_error("a divided warp", half + "@%p bra $L;\n" + mma + "\n$L:\nmov.b32 %a, 0;");
  expect_error("a divided warp", half + "@%p " + mma);
  expect_error("a divided warp", half + "@%p bar.sync 0;");
  expect_error("a divided warp", half + "@%p bra $L;\nbar.warp.sync -1;\n$L:\nmov.b32 %a, 0;");
  expect_error("a divided warp", half + "@%p shfl.sync.idx.b32 %a, %t, 0, 31, -1;");
  expect_error("not all threads reach", "setp.lt.u32 %p, %t, 32;\n@%p bra $L;\nbar.sync 0;\n$L:\nmov.b32 %a, 0;", 64);
  expect_error(
      "not rounded to TF32",
      "mov.b32 %a, 0x3f800001;\nmov.b32 %c, 0;\n"
      "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%b, %b, %b, %b}, {%a, %a}, {%a}, {%c, %c, %c, %c};");
}

// What is allowed, whatever the order: a warp's own barrier, a block's, one of some warps, and copies that are waited
// for.
inline void test_barriers() {
  std::vector<uint32_t> in(1024), out(128);
  for (uint32_t i = 0; i < in.size(); ++i) in[i] = i * i;
  const std::string start =
      ".reg .b32 %a, %b, %c;\n.reg .b64 %x, %y;\n.reg .pred %p;\nshl.b32 %a, %t, 2;\n"
      "mad.wide.u32 %x, %t, 4, %in;\nmad.wide.u32 %y, %t, 4, %out;\n";
  const std::string finish = "xor.b32 %a, %a, 128;\nld.shared.b32 %c, [%a];\nst.global.b32 [%y], %c;";
  for (const std::string& fill :
       {std::string("ld.global.b32 %b, [%x];\nst.shared.b32 [%a], %b;\n"),
        std::string("cp.async.ca.shared.global [%a], [%x], 4;\ncp.async.commit_group;\n"
                    "cp.async.commit_group;\ncp.async.wait_group 1;\n"),
        std::string("cp.async.ca.shared::cta.global.L2::128B [%a], [%x], 4;\ncp.async.wait_all;\n")}) {
    for (const char* barrier :
         {"bar.sync 0;\n", "barrier.sync.aligned 1, 128;\n",
          // Warps 0 and 1 meet at barrier 3, 2 and 3 at barrier 4.
          "setp.lt.u32 %p, %t, 64;\n@%p bra $L;\nbar.sync 4, 64;\nbra.uni $E;\n$L:\nbar.sync 3, 64;\n$E:\n"}) {
      for (uint64_t seed = 0; seed < 5; ++seed) {
        const Result done = run(start + fill + barrier + finish, in, out, 128, 512, seed);
        bool right = done.error.empty();
        for (int i = 0; i < 128; ++i) right = right && out[i] == in[i ^ 32];
        check(right, std::string("barriers: ") + barrier + done.error);
      }
    }
  }
  tested.insert({"cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"});
}

// cp.async of each size, with all or a part of its source, the rest zeros.
inline void test_copies() {
  std::vector<uint32_t> in(128), out(128);
  for (uint32_t i = 0; i < in.size(); ++i) in[i] = 0x01010101u * (i + 1);
  for (const auto& [opcode, size] :
       std::vector<std::pair<std::string, int>>{{"ca", 4}, {"ca", 8}, {"ca", 16}, {"cg", 16}}) {
    for (int given : {size, size / 2, 1, 0}) {
      std::fill(out.begin(), out.end(), 0xffffffffu);
      const std::string n = std::to_string(size);
      const Result done = run(
          ".reg .b32 %a, %b, %g, %w<4>;\n.reg .b64 %x, %y;\nmul.lo.u32 %a, %t, " + n + ";\nmad.wide.u32 %x, %t, " + n +
              ", %in;\nmad.wide.u32 %y, %t, " + n + ", %out;\nmov.b32 %g, " + std::to_string(given) + ";\ncp.async." +
              opcode + ".shared.global [%a], [%x], " + n + ", %g;\ncp.async.wait_all;\n" +
              (size == 4 ? "ld.shared.b32 %w0, [%a];\nst.global.b32 [%y], %w0;"
               : size == 8
                   ? "ld.shared.v2.b32 {%w0, %w1}, [%a];\nst.global.v2.b32 [%y], {%w0, %w1};"
                   : "ld.shared.v4.b32 {%w0, %w1, %w2, %w3}, [%a];\nst.global.v4.b32 [%y], {%w0, %w1, %w2, %w3};"),
          in, out, 32, 32 * size);
      bool right = done.error.empty();
      const auto *const bytes = reinterpret_cast<const unsigned char*>(out.data()),
                        *const from = reinterpret_cast<const unsigned char*>(in.data());
      for (int i = 0; i < 32 * size; ++i) right = right && bytes[i] == (i % size < given ? from[i] : 0);
      check(right, "cp.async." + opcode + " of " + n + " bytes, " + std::to_string(given) + " given: " + done.error);
    }
  }
}

// Loops of a different length in every lane, in one another, that some lanes leave early; behind them the warp is
// whole.
inline void test_divided_warps() {
  std::vector<uint32_t> in(32), out(32);
  const std::string body = R"(
.reg .b32 %i, %j, %n, %m, %sum, %d;
.reg .b64 %a, %b;
.reg .pred %p, %q;
mad.wide.u32 %a, %t, 4, %in;
mad.wide.u32 %b, %t, 4, %out;
ld.global.b32 %n, [%a];
mov.b32 %sum, 0;
mov.b32 %i, 0;
$outer:
setp.ge.u32 %p, %i, %n;
@%p bra $done;
mov.b32 %j, 0;
and.b32 %m, %i, 3;
$inner:
setp.gt.u32 %p, %j, %m;
@%p bra $next;
add.u32 %sum, %sum, %j;
add.u32 %j, %j, 1;
setp.gt.u32 %q, %sum, 20;
@%q bra $done;
bra.uni $inner;
$next:
add.u32 %i, %i, 1;
bra $outer;
$done:
shfl.sync.bfly.b32 %d, %sum, 1, 31, -1;
st.global.b32 [%b], %d;
setp.lt.u32 %p, %t, 7;
@%p ret;
bar.sync 0;)";
  std::mt19937 random(3);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    std::vector<uint32_t> sums;
    for (uint32_t& n : in) {
      n = random() % 12;
      uint32_t sum = 0;
      for (uint32_t i = 0; i < n && sum <= 20; ++i) {
        for (uint32_t j = 0; j <= (i & 3) && sum <= 20; ++j) sum += j;
      }
      sums.push_back(sum);
    }
    const Result done = run(body, in, out, 32, 0, seed);
    bool right = done.error.empty();
    for (int lane = 0; lane < 32; ++lane) right = right && out[lane] == sums[lane ^ 1];
    check(right, "divided warps: " + done.error);
  }
}

inline void test_generic_addresses() {
  std::vector<uint32_t> in(32, 5), out(32);
  const std::string body = R"(
.reg .b32 %a, %b;
.reg .b64 %x, %y, %z, %p;
mov.u64 %z, memory;
cvta.shared.u64 %x, %z;
mul.wide.u32 %y, %t, 4;
add.u64 %x, %x, %y;
add.u32 %a, %t, 100;
st.b32 [%x], %a;
cvta.to.shared.u64 %z, %x;
ld.shared.b32 %b, [%z];
mov.b64 %p, test_param_1;
cvta.param.u64 %p, %p;
ld.b64 %z, [%p];
cvta.to.param.u64 %p, %p;
ld.param.b64 %z, [%p];
cvta.to.global.u64 %z, %z;
add.u64 %z, %z, %y;
st.b32 [%z], %b;)";
  const Result done = run(body, in, out, 32, 128);
  bool right = done.error.empty();
  for (uint32_t i = 0; i < 32; ++i) right = right && out[i] == 100 + i;
  check(right, "generic addresses: " + done.error);
  tested.insert({"cvta.shared.u64", "cvta.to.shared.u64", "cvta.param.u64", "cvta.to.param.u64"});
}

// Parts of registers, loads that extend, registers of a scope, and stores of some lanes.
inline void test_moves() {
  std::vector<uint32_t> in(32), out(32, 9);
  for (uint32_t i = 0; i < 32; ++i) in[i] = 0x80f00000u + i * 0x01010101u;
  const std::string body = R"(
.reg .b32 %v, %w;
.reg .b16 %h<2>;
.reg .b64 %a, %b, %d;
mad.wide.u32 %a, %t, 4, %in;
mad.wide.u32 %b, %t, 4, %out;
ld.global.nc.L1::no_allocate.b32 %v, [%a];
mov.b32 {%h0, %h1}, %v;
mov.b32 %v, {%h1, %h0};
mov.b64 %d, {%v, %v};
mov.b64 {_, %v}, %d;
ld.global.s16 %w, [%a+2];
add.s32 %v, %v, %w;
{ .reg .pred odd; .reg .b32 low; and.b32 low, %t, 1; setp.ne.u32 odd, low, 0; @odd st.global.b32 [%b], %v; }
)";
  const Result done = run(body, in, out);
  bool right = done.error.empty();
  for (uint32_t i = 0; i < 32; ++i) {
    const uint32_t expected = (in[i] << 16 | in[i] >> 16) + static_cast<uint32_t>(static_cast<int16_t>(in[i] >> 16));
    right = right && out[i] == (i % 2 ? expected : 9);
  }
  check(right, "moves: " + done.error);
}

// Counts that can be said ahead.
inline void test_counts() {
  std::vector<uint32_t> in(2048), out(2048);
  const auto count = [&](const std::string& body, const std::string& opcode) {
    const Result done = run(".reg .b32 %a, %v<4>;\n.reg .b64 %x;\n.reg .pred %p;\n" + body, in, out, 32, 16384);
    check(done.error.empty(), body + done.error);
    const auto found = done.counts.find(opcode);
    return found == done.counts.end() ? ptx::Count() : found->second;
  };
  const auto shared = [&](const std::string& factor, const std::string& vector, const std::string& values) {
    const ptx::Count got =
        count("mul.lo.u32 %a, %t, " + factor +
                  ";\nmov.b32 %v0, 0;\nmov.b32 %v1, 0;\nmov.b32 %v2, 0;\nmov.b32 %v3, 0;\nst.shared" + vector +
                  " [%a], " + values + ";",
              "st.shared" + vector);
    return std::make_pair(got.shared_accesses, got.shared_wavefronts);
  };
  using Pair = std::pair<int64_t, int64_t>;
  check(shared("4", ".b32", "%v0") == Pair(1, 1), "words side by side");
  check(shared("8", ".b32", "%v0") == Pair(1, 2), "every second word");
  check(shared("128", ".b32", "%v0") == Pair(1, 32), "words of one bank");
  check(shared("132", ".b32", "%v0") == Pair(1, 1), "rows of 33 words");
  check(shared("8", ".v2.b32", "{%v0, %v1}") == Pair(2, 2), "8 bytes side by side");
  check(shared("16", ".v4.b32", "{%v0, %v1, %v2, %v3}") == Pair(4, 4), "16 bytes side by side");
  check(shared("128", ".v4.b32", "{%v0, %v1, %v2, %v3}") == Pair(4, 32), "16 bytes of the same banks");
  check(shared("48", ".v4.b32", "{%v0, %v1, %v2, %v3}") == Pair(4, 4), "16 bytes of an odd pitch");
  const auto global = [&](const std::string& factor, const std::string& opcode, const std::string& values) {
    const ptx::Count got = count("add.s64 %in, %in, 31;\nand.b64 %in, %in, -32;\nmad.wide.u32 %x, %t, " + factor +
                                     ", %in;\n" + opcode + " " + values + ", [%x];",
                                 opcode);
    return std::make_pair(got.global_bytes, got.global_sectors);
  };
  check(global("4", "ld.global.b32", "%v0") == Pair(128, 4), "sectors of words side by side");
  check(global("32", "ld.global.b32", "%v0") == Pair(128, 32), "sectors of scattered words");
  check(global("0", "ld.global.b32", "%v0") == Pair(128, 1), "sectors of one word");
  check(global("16", "ld.global.v4.b32", "{%v0, %v1, %v2, %v3}") == Pair(512, 16), "sectors of 16 bytes a lane");
  check(
      count("setp.lt.u32 %p, %t, 0;\n@%p mov.b32 %a, 0;", "mov.b32").executed == 1, "executed by no lane, and counted");
}

inline void test_polls() {
  std::vector<uint32_t> in(96), out(96);
  for (uint32_t& value : in) value = 0;
  in[5] = in[70] = 1;
  const auto answers = [&](const std::string& opcode, const std::string& to, const std::string& predicate) {
    const Result done =
        run(".reg .b32 %v, %d;\n.reg .b64 %a, %b;\n.reg .pred %p, %q;\nmad.wide.u32 %a, %t, 4, %in;\n"
            "mad.wide.u32 %b, %t, 4, %out;\nld.global.b32 %v, [%a];\nsetp.ne.u32 %p, %v, 0;\n" +
                opcode + " " + to + ", 0, " + predicate + ";\n" + (to == "%q" ? "selp.b32 %d, 1, 0, %q;\n" : "") +
                "st.global.b32 [%b], %d;",
            in, out, 96);
    check(done.error.empty(), opcode + ": " + done.error);
    check(std::all_of(out.begin(), out.end(), [&](uint32_t one) { return one == out[0]; }), opcode);
    return out[0];
  };
  check(answers("bar.red.popc.u32", "%d", "%p") == 2, "bar.red.popc");
  check(answers("barrier.red.popc.aligned.u32", "%d", "!%p") == 94, "bar.red.popc of a negated predicate");
  check(answers("bar.red.or.pred", "%q", "%p") == 1, "bar.red.or");
  check(answers("bar.red.and.pred", "%q", "%p") == 0, "bar.red.and");
  in[5] = in[70] = 0;
  check(answers("bar.red.or.pred", "%q", "%p") == 0, "bar.red.or of none");
  check(answers("bar.red.and.pred", "%q", "!%p") == 1, "bar.red.and of all");
}

inline void test_machine() {
  test_polls();
  test_errors();
  test_barriers();
  test_copies();
  test_divided_warps();
  test_generic_addresses();
  test_moves();
  test_counts();
}

}  // namespace ptx_test
