// Prints the planner's choice for each case of standard input, one a line as `key=value` pairs, the words last.
#include <iostream>

#include "case.h"

int main() {
  using namespace shufflenet::cuda;
  for (std::string line; std::getline(std::cin, line);) {
    const Case c(line);
    const Plan plan = plan_unit(c.unit(), c.dtype(), c.device());
    const Tiling& t = plan.tiling;
    const StripTiling& strips = plan.strips.tiling;
    std::cout << "ok=" << plan.ok << " tile_rows=" << t.tile_rows << " tile_columns=" << t.tile_columns
              << " slices=" << t.slices << " chunk=" << t.chunk << " tile_depth=" << t.tile_depth
              << " x_vector=" << t.x_vector << " conv1_vector=" << t.conv1_vector << " conv3_vector=" << t.conv3_vector
              << " result_vector=" << t.result_vector << " shared_bytes=" << plan.shared_bytes
              << " shared_per_block=" << c.device().shared_per_block << " windows=" << plan.windows
              << " blocks=" << plan.blocks_per_multiprocessor << " multiprocessors=" << c.device().multiprocessors
              << " by_strips=" << plan.by_strips << " strips=" << plan.strips.blocks
              << " strip_blocks=" << plan.strips.blocks_per_multiprocessor << " strip_rows=" << strips.rows
              << " strip_slices=" << strips.slices << " strip_warps=" << strips.warps << " strip_gap=" << strips.gap
              << " strip_busy_percent="
              << static_cast<int64_t>(100 * plan.strips.busy_warps / std::max(1, strips.warps))
              << " strip_instructions=" << static_cast<int64_t>(plan.strips.instructions)
              << " strip_cycles=" << static_cast<int64_t>(plan.strips.cycles)
              << " cycles=" << static_cast<int64_t>(plan.cycles) << " explanation=" << plan.explanation << "\n";
  }
}
