// Tests what executes PTX (ptx/machine.h) with kernels of a few lines, against plain C++ that is written from the PTX
// ISA on its own. Prints what failed, and last the number of checks.
#include "ptx_test/machine_test.h"
#include "ptx_test/scalar_test.h"
#include "ptx_test/warp_test.h"

int main() {
  using namespace ptx_test;
  test_scalar();
  test_warp();
  test_machine();
  for (const auto& [opcode, operation] : ptx::operations()) check(tested.count(opcode) != 0, opcode + " has no test");
  for (const auto& [opcode, execute] : ptx::warp_operations())
    check(tested.count(opcode) != 0, opcode + " has no test");
  std::printf("%d checks, %d failed\n", checks, failed);
  return failed != 0;
}
