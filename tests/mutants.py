"""Plants faults in the kernels and the Python around them, one at a time, and expects the short suite to fail on each.

    python tests/mutants.py [--write | --missing] [name ...]

Without names all faults are planted, in a copy of the working tree below build/. With --write the table of faults goes
to docs/mutants.md; with --missing only those are planted that the table lacks, and are added to it. Exits with 1 if the
suite passes with a fault in place (that fault asks for a test), or if a fault does not fit the source any more.

To build the library anew for each fault would take minutes each time. So the CPU's faults are all compiled into one
library, each behind a switch, and the environment says which one is switched on. That is why such a fault replaces an
expression by another of the same type. Faults in other files are written into the copy: Python is not built, and the
tests of the CUDA kernels build these themselves.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"
TABLE = ROOT / "docs" / "mutants.md"
SECONDS_OF_A_RUN = 1800  # more than the short suite takes anywhere; a fault may make threads wait forever


@dataclass(frozen=True)
class Mutant:
    """A fault: in the file, `old`, which is there once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # those that are run first, files or functions of tests/, as they are likely to fail

    @property
    def is_switched(self) -> bool:
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")

    @property
    def switch(self) -> int:
        """Depends on the name alone, so that a new fault does not change all files."""
        return zlib.crc32(self.name.encode())


KERNELS, SCHEDULE, TRAINING, CUDA = "csrc/cpu/kernels/", "csrc/cpu/schedule/", "csrc/cpu/training/", "csrc/cuda/"
MUTANTS = [
    # ---- The CPU's kernels
    Mutant(
        "a mask of one lane too many: stride 2 reads past the end of a row",
        KERNELS + "depthwise.h",
        "std::max<int64_t>(0, unit.width - first)",
        "std::max<int64_t>(0, unit.width - first + 1)",
        "test_kernels.py::test_planes",
    ),
    Mutant(
        "a mask of one lane too many: stride 1 reads right of a row's last pixel",
        KERNELS + "depthwise.h",
        "column < unit.width - 1",
        "column < unit.width",
        "test_kernels.py::test_planes",
    ),
    Mutant(
        "a mask of one lane too few: the last pixel of a plane is not stored",
        KERNELS + "depthwise.h",
        "S::first(pixels % S::kLanes)",
        "S::first(pixels % S::kLanes - 1)",
        "test_kernels.py::test_planes",
    ),
    Mutant(
        "a halo row: the one below a part of an image is taken for one outside of it",
        KERNELS + "depthwise.h",
        "std::min(unit.height, halo.end)",
        "std::min(unit.height, halo.end - 1)",
        "test_network.py::test_large_planes test_threads.py",
    ),
    Mutant(
        "a halo row: a strip borrows the first row of the strip above, not the last",
        KERNELS + "unit.h",
        "StripRows<A>(unit, *strip.above).last_row",
        "StripRows<A>(unit, *strip.above).first_row",
        "test_network.py::test_strips_equal_its_units_one_by_one",
    ),
    Mutant(
        "a halo row: a strip lends its last row but one",
        KERNELS + "unit.h",
        "rows.from_row(rows.own.count())",
        "rows.from_row(rows.own.count() - 1)",
        "test_network.py::test_strips_equal_its_units_one_by_one",
    ),
    Mutant(
        "a shifted residual: a part adds the rows of x from its halo on",
        KERNELS + "unit.h",
        "(rows.begin - image.begin) * unit.width;",
        "int64_t{0};",
        "test_threads.py::test_results_do_not_depend_on_the_number_of_threads test_network.py::test_large_planes",
    ),
    Mutant(
        "a lost residual: strips do not add x",
        KERNELS + "unit.h",
        "unit.stride == 1 ? x.behind(pixel) : Planes<const Element>{}",
        "Planes<const Element>{}",
        "test_network.py::test_large_planes",
    ),
    Mutant(
        "the shuffle's stride: conv1's groups instead of the shuffle's",
        KERNELS + "format_floats.h",
        "(row - r * n) * unit.shuffle_groups + r",
        "(row - r * n) * unit.conv1_groups + r",
        "test_kernels.py::test_conv1_groups_differ_from_groups",
    ),
    Mutant(
        "a bound: the pooled shortcut always gets a ReLU",
        "csrc/unit.h",
        "shortcut_relu ? kRelu : kNoActivation",
        "kRelu",
        "test_kernels.py::test_units_in_general",
    ),
    Mutant(
        "a slice's offset: the shortcut that comes first goes behind conv3's channels",
        "csrc/unit.h",
        "shortcut_first ? 0 : out_channels",
        "out_channels",
        "test_kernels.py::test_units_in_general",
    ),
    Mutant(
        "the shuffle's stride: a shuffle of other groups is ignored",
        "csrc/arguments.h",
        "a.shuffle_groups.value_or(a.groups)",
        "a.groups",
        "test_kernels.py::test_units_in_general",
    ),
    Mutant(
        "a slice's offset: a group reads from the last channel of the group before on",
        KERNELS + "pointwise.h",
        "x.channel(rows.group * p.depth)",
        "x.channel(std::max<int64_t>(0, rows.group * p.depth - 1))",
        "test_kernels.py::test_groups",
    ),
    Mutant(
        "a tile's depth: the last block of a deep sum is left out",
        KERNELS + "pointwise_tile.h",
        "std::min(k + t.block, t.depth)",
        "std::min(k + t.block, t.depth - 1)",
        "test_kernels.py::test_depths_at_the_blocks",
    ),
    Mutant(
        "a bias: all channels of a tile get the first one's",
        KERNELS + "pointwise_tile.h",
        "S::broadcast(t.bias[c])",
        "S::broadcast(t.bias[0])",
        "test_kernels.py::test_relu_and_bias",
    ),
    Mutant(
        "a lost residual: at a plane's last pixel, where that has a vector for itself",
        KERNELS + "pointwise_tile.h",
        "t.residual[row * t.residual_stride]",
        "A{0}",
        "test_kernels.py::test_planes",
    ),
    Mutant(
        "a lost scale: at a plane's last pixel, where that has a vector for itself",
        KERNELS + "pointwise_tile.h",
        "(t.scale ? t.scale[row] : A{1})",
        "A{1}",
        "test_kernels.py::test_a_last_pixel_alone_in_its_vector",
    ),
    Mutant(
        "the pool's divisor: the first row of windows counts three rows",
        KERNELS + "average_pool.h",
        "shares[(row > 0) + has_bottom]",
        "shares[1 + has_bottom]",
        "test_kernels.py::test_pool_counts_padding",
    ),
    Mutant(
        "the pool's divisor: the first column of windows counts three columns",
        KERNELS + "average_pool.h",
        "S::broadcast(column > 0 ? 1 : 0)",
        "S::broadcast(1)",
        "test_kernels.py::test_pool_counts_padding",
    ),
    Mutant(
        "the pool's last row is left out where the height is even",
        KERNELS + "average_pool.h",
        "2 * row + 1 < unit.height",
        "2 * row + 2 < unit.height",
        "test_kernels.py::test_pool_counts_padding",
    ),
    Mutant(
        "the max pool leaves out the right columns of windows",
        KERNELS + "max_pool.h",
        "largest(largest(columns.left, columns.centre), columns.right)",
        "largest(columns.left, columns.centre)",
        "test_stem_and_head.py::test_stems",
    ),
    Mutant(
        "the max pool takes what is right of a row for zeros where values may be negative",
        KERNELS + "max_pool.h",
        "S::keep(ordered(S::load(row + column, inside)), inside)",
        "ordered(S::load(row + column, inside))",
        "test_stem_and_head.py::test_a_max_pool_of_negative_values_takes_nothing_for_its_padding",
    ),
    Mutant(
        "the max pool of a stem without ReLU leaves out the values' signs",
        KERNELS + "max_pool.h",
        "stem.relu ? MaxPool<A, Integer>::row : MaxPool<A, std::make_unsigned_t<Integer>>::row",
        "MaxPool<A, Integer>::row",
        "test_stem_and_head.py::test_stems",
    ),
    Mutant(
        "a program that ends in a unit is not converted back to channels_last",
        SCHEDULE + "plan.cpp",
        "in_pairs || dtype != accumulator || program.layout != Layout::contiguous",
        "in_pairs || dtype != accumulator",
        "test_network.py::test_as_accurate_as_pytorch",
    ),
    Mutant(
        "the max pool forgets the row above the rows of the convolution that are at hand",
        KERNELS + "stem.h",
        "row > 0 ? last_row : middle",
        "middle",
        "test_stem_and_head.py::test_stems",
    ),
    Mutant(
        "the stem's padding: rows are not shifted by it",
        KERNELS + "stem.h",
        "end_ * s + remainder - stem_.padding",
        "end_ * s + remainder",
        "test_stem_and_head.py::test_stems",
    ),
    Mutant(
        "the head's divisor: the pixels of the plane, not of the window",
        KERNELS + "head.h",
        "static_cast<A>(head.window_height * head.window_width)",
        "static_cast<A>(head.height * head.width)",
        "test_stem_and_head.py::test_heads",
    ),
    Mutant(
        "a mask of one lane too few: the linear layer leaves out the last channel",
        KERNELS + "head.h",
        "S::first(head.channels - channel)",
        "S::first(head.channels - channel - 1)",
        "test_stem_and_head.py::test_channels_of_the_head",
    ),
    Mutant(
        "channels last: the last channels of a pixel are not written",
        KERNELS + "image.h",
        "store_first(y + (p + i) * image.channels + c, rows[i], left)",
        "store_first(y + (p + i) * image.channels + c, rows[i], left - 1)",
        "test_kernels.py::test_planes",
    ),
    Mutant(
        "rounding to bfloat16: halves go up, not to even",
        KERNELS + "simd.h",
        "(word + 0x7fff + ((word >> 16) & 1)) >> 16",
        "(word + 0x8000) >> 16",
        "test_kernels.py::test_16_bit_results_round_to_nearest_even",
    ),
    Mutant(
        "rounding to float16: NaN becomes infinity",
        KERNELS + "simd.h",
        "Word{} + 0x7e00",
        "Word{} + 0x7c00",
        "test_kernels.py::test_nan_and_inf_propagate_as_in_the_reference",
    ),
    Mutant(
        "AVX2: a masked load reads every lane",
        "csrc/cpu/isa/avx2.h",
        "_mm256_maskload_ps(p, m)",
        "_mm256_loadu_ps(p)",
        "test_kernels.py::test_planes",
    ),
    Mutant(
        "AVX-512: the activation of a double loses NaN",
        "csrc/cpu/isa/avx512.h",
        "_mm512_maskz_max_pd(0xff, a, b)",
        "_mm512_maskz_max_pd(0xff, b, a)",
        "test_kernels.py::test_nan_and_inf_propagate_as_in_the_reference",
    ),
    Mutant(
        "baseline: the activation loses NaN",
        "csrc/cpu/isa/baseline.h",
        "a > b ? a : b",
        "b > a ? b : a",
        "test_kernels.py::test_nan_and_inf_propagate_as_in_the_reference",
    ),
    # ---- The CPU's kernels on planes of pairs
    Mutant(
        "pairs: the shuffle's stride: conv1's groups instead of the shuffle's",
        KERNELS + "format_pairs.h",
        "row % unit.shuffle_rows() * unit.shuffle_groups + row / unit.shuffle_rows()",
        "row % unit.shuffle_rows() * unit.conv1_groups + row / unit.shuffle_rows()",
        "test_pairs.py",
    ),
    Mutant(
        "pairs: the padding of an odd slice is not cleared",
        KERNELS + "format_pairs.h",
        "std::fill_n(out_planes.channel(1), pixels, 0.0f)",
        "std::fill_n(out_planes.channel(1), 0, 0.0f)",
        "test_pairs.py",
    ),
    Mutant(
        "pairs: a plane's lone pixel is multiplied by another group's channels",
        KERNELS + "format_pairs.h",
        "range->group != gathered",
        "gathered < 0",
        "test_pairs.py",
    ),
    Mutant(
        "pairs: a row that waits for its partner is lost",
        KERNELS + "format_pairs.h",
        "finish(row - 1, kept, sums, pixel, n)",
        "finish(row - 1, sums, sums, pixel, n)",
        "test_pairs.py",
    ),
    Mutant(
        "pairs: a mask: the mean reads past a window's row",
        KERNELS + "head_pairs.h",
        "S::keep(Pairs::load(from + column), inside)",
        "Pairs::load(from + column)",
        "test_pairs.py",
    ),
    # ---- The CPU's schedule and the ops' arguments
    Mutant(
        "a missing wait: a phase starts before the last task of the one before is done",
        SCHEDULE + "phases.h",
        "progress[p].done.load(std::memory_order_acquire) < phase.tasks",
        "progress[p].done.load(std::memory_order_acquire) < std::max<int64_t>(0, phase.tasks - 1)",
        "test_threads.py::test_phases_wait_for_each_other",
    ),
    Mutant(
        "the row above a strip: the pool takes the strip's own first row for it",
        SCHEDULE + "unit_step.h",
        "(rows_above - 1) * unit_.width",
        "rows_above * unit_.width",
        "test_network.py::test_strips_equal_its_units_one_by_one",
    ),
    Mutant(
        "a unit in parts writes its result over the rows of x that the next part reads",
        SCHEDULE + "unit_step.h",
        "(partition.parts == 1 || partition.sharing == Sharing::strips)",
        "true",
        "test_network.py",
    ),
    Mutant(
        "lent rows: there is memory for those of two strips, not of three",
        SCHEDULE + "unit_step.h",
        "i % 3 * lent_bytes",
        "i % 2 * lent_bytes",
        "test_network.py::test_large_planes test_network.py::test_strips_equal_its_units_one_by_one",
    ),
    Mutant(
        "a step writes its result over its input",
        SCHEDULE + "step.h",
        "1 - next",
        "next",
        "test_network.py::test_equals_its_units_one_by_one",
    ),
    Mutant(
        "batch norm's shift: the mean is not scaled",
        SCHEDULE + "weights.h",
        "distance * scale[c]",
        "distance",
        "test_kernels.py::test_groups",
    ),
    Mutant(
        "a convolution's bias ahead of a batch norm is left out",
        SCHEDULE + "weights.h",
        "mean[c] - (conv_bias ? conv_bias[c] : A{0})",
        "mean[c]",
        "test_kernels.py::test_batch_norm_without_weights_and_biases",
    ),
    Mutant(
        "batch norm's eps is left out",
        SCHEDULE + "weights.h",
        "std::sqrt(var[c] + eps)",
        "std::sqrt(var[c])",
        "test_kernels.py::test_groups",
    ),
    Mutant(
        "a check that no longer refuses: x and a result that it is added to differ in channels",
        "csrc/arguments.h",
        "unit.stride == 1 && unit.out_channels != unit.in_channels",
        "false",
        "test_errors.py::test_results_that_do_not_fit_x_or_the_groups",
    ),
    Mutant(
        "a check that no longer refuses: more weights than the program takes",
        "csrc/program.h",
        "used_ != weights_",
        "used_ > weights_",
        "test_network.py::test_bad_weights",
    ),
    Mutant(
        "the strides of x are not looked at",
        "csrc/arguments.h",
        "is_dense || x.numel() == 0",
        "true",
        "test_kernels.py::test_any_strides_of_x",
    ),
    # ---- The CUDA kernels, run on the CPU
    Mutant(
        "CUDA: the halo below a window is left out",
        CUDA + "unit_window.cuh",
        "in_rows((out_rows - 1) * s.stride + 3)",
        "in_rows((out_rows - 1) * s.stride + 2)",
        "test_cuda_host.py::test_thread_order_does_not_matter",
    ),
    Mutant(
        "CUDA: the shuffle's stride: conv1's groups instead of the shuffle's",
        CUDA + "unit_conv1.cuh",
        "least(row, at.run.rows - 1) * s.shuffle_groups",
        "least(row, at.run.rows - 1) * s.conv1_groups",
        "test_cuda_host.py::test_units_of_all_kinds",
    ),
    Mutant(
        "CUDA: a slice's offset: slices of y2 are not padded to whole steps",
        CUDA + "unit_conv3.cuh",
        "(slice - w.slice_begin) * layout.slice_pitch",
        "(slice - w.slice_begin) * s.slice_channels",
        "test_cuda_host.py::test_units_of_all_kinds",
    ),
    Mutant(
        "CUDA: a bias: conv1 gets the depthwise convolution's",
        CUDA + "unit_staging.cuh",
        "taps[2 * i + 1] = first.bias",
        "taps[2 * i + 1] = second.bias",
        "test_cuda_host.py::test_thread_order_does_not_matter",
    ),
    Mutant(
        "CUDA: the pool's divisor counts the padding",
        CUDA + "unit_pool.cuh",
        "s.pool_count_include_pad ? 9 : rows * columns",
        "s.pool_count_include_pad ? 9 : 9 + 0 * rows * columns",
        "test_cuda_host.py::test_units_of_all_kinds",
    ),
    Mutant(
        "CUDA: a lost residual",
        CUDA + "unit_conv3.cuh",
        "if (s.stride != 1 || first_line",
        "if (s.stride >= 1 || first_line",
        "test_cuda_host.py::test_thread_order_does_not_matter",
    ),
    Mutant(
        "CUDA: a missing barrier between weights and conv1",
        CUDA + "unit_kernel.cuh",
        "    barrier();  // all threads see weights and taps\n",
        "",
        "test_cuda_host.py::test_thread_order_does_not_matter",
    ),
    Mutant(
        "CUDA: strips: NaN in the depthwise convolution goes unnoticed",
        CUDA + "strip_kernel.cuh",
        "warp_any(any != any)",
        "warp_any(any != any && lane < 0)",
        "test_cuda_strips.py::test_strips_of_all_kinds",
    ),
    Mutant(
        "CUDA: strips: the pool's shares of channels leave the last ones out",
        CUDA + "strip_pool.cuh",
        "share_pairs = ceil_div(end - begin, shares)",
        "share_pairs = (end - begin) / shares",
        "test_cuda_strips.py::test_strips_around_the_tiles",
    ),
    Mutant(
        "CUDA: strips: the pooled shortcut lies where conv3's channels do",
        CUDA + "strip_pool.cuh",
        "+ s.first_pooled_channel + channel;",
        "+ s.first_conv3_channel + channel;",
        "test_cuda_strips.py::test_strips_of_all_kinds",
    ),
    Mutant(
        "CUDA: strips: a row of conv1 is taken for the channel that it becomes",
        CUDA + "pack_kernel.cuh",
        "return channel < 0 ? -1 : PackedLayout::conv1_row(s, channel);",
        "return channel;",
        "test_cuda_strips.py::test_strips_of_all_kinds",
    ),
    Mutant(
        "CUDA: strips of planes: the residual is that of the strip's first row of x",
        CUDA + "strip_planes.cuh",
        "return s.stride == 1 ? rows_above_result() * s.width : 0;",
        "return 0;",
        "test_cuda_strips.py::test_copies_of_planes",
    ),
    Mutant(
        "CUDA: strips of planes: more planes are taken together than are left",
        CUDA + "strip_planes.cuh",
        "ceil_div(runs.planes - plane, step)",
        "ceil_div(runs.planes, step)",
        "test_cuda_strips.py::test_copies_of_planes",
    ),
    Mutant(
        "CUDA: strips of planes: the pool's divisor counts a row above the image",
        CUDA + "strip_plane_pool.cuh",
        "3 * scale(1 + has_top + has_bottom)",
        "3 * scale(2 + has_bottom)",
        "test_cuda_strips.py::test_strips_around_the_tiles",
    ),
    Mutant(
        "CUDA: a kernel is loaded as if no stream were captured",
        CUDA + "launch.cu",
        "  const RelaxedCapture relaxed;\n",
        "",
        "test_cuda_launch.py::test_a_first_launch_inside_of_a_capture",
    ),
    Mutant(
        "CUDA: a launch leaves its device current",
        CUDA + "launch.cu",
        "if (previous_ != index_ && has_context(previous_))",
        "if (previous_ == index_ && has_context(previous_))",
        "test_cuda_launch.py::test_a_launch_for_another_device_on_a_fresh_thread",
    ),
    Mutant(
        "CUDA: a launch makes a context on the device that was current",
        CUDA + "launch.cu",
        "if (previous_ != index_ && has_context(previous_))",
        "if (previous_ != index_)",
        "test_cuda_launch.py::test_a_device_that_had_no_context_has_none_behind_the_launch",
    ),
    Mutant(
        "first contact: a hanging step's children live on",
        "benchmarks/first_contact/runner.py",
        "os.killpg(process.pid, signal.SIGKILL)",
        "os.kill(process.pid, signal.SIGKILL)",
        "test_first_contact.py::test_a_step_that_fails_or_hangs_does_not_stop_the_others",
    ),
    Mutant(
        "first contact: a driver that ends takes the cases behind with it",
        "benchmarks/first_contact/driver.py",
        "_of_a_process(command, lines[done:], seconds)",
        "_of_a_process(command, lines[done:] * (done == 0), seconds)",
        "test_first_contact.py::test_a_case_that_ends_or_holds_the_driver_is_one_failure",
    ),
    Mutant(
        "first contact: what lies around a result is not looked at",
        "benchmarks/first_contact/driver.cpp",
        "difference.is_small() && is_guarded",
        "difference.is_small()",
        "test_first_contact.py::test_the_driver_names_what_is_wrong",
    ),
    Mutant(
        "CUDA: all units of a program take the first one's packed weights",
        CUDA + "ops.cpp",
        "units_.back().at = packed_elements_;",
        "units_.back().at = 0;",
        "test_cuda_ops.py::test_networks",
    ),
    Mutant(
        "CUDA: packed weights of another dtype are taken",
        CUDA + "ops.cpp",
        'check_like_x("packed", packed, weights_);',
        "",
        "test_cuda_ops.py::test_what_is_no_networks_packed_weights_is_refused",
    ),
    Mutant(
        "CUDA: weights that were changed in place stay packed as they were",
        "shufflenet_ext/_packed.py",
        "(self.address, self.changes) == (self.source.data_ptr(), self.source._version)",
        "self.address == self.source.data_ptr()",
        "test_cuda_ops.py::test_changed_weights_are_packed_anew_into_the_same_memory",
    ),
    Mutant(
        "CUDA: what is packed within a graph's capture is kept, though nothing has run yet",
        "shufflenet_ext/_packed.py",
        "if torch.cuda.is_current_stream_capturing():",
        "if False:",
        "test_cuda_ops.py::test_captures_pack_for_themselves_what_was_not_packed_ahead",
    ),
    # ---- ShuffleNet v2
    Mutant(
        "v2's names of planes: the shuffle goes the other way",
        SCHEDULE + "channel_planes.h",
        "planes[group * rows + row]",
        "planes[row * groups + group]",
        "test_v2.py::test_as_accurate_as_pytorch",
    ),
    Mutant(
        "v2's names of planes: conv1 reads the half that passes by",
        SCHEDULE + "channel_planes.h",
        "split + unit.conv1_first()",
        "split + (unit.conv1_first() - unit.conv1_first())",
        "test_v2.py::test_as_accurate_as_pytorch",
    ),
    Mutant(
        "v2's names of planes: a result is written in the order of its planes",
        SCHEDULE + "plan.cpp",
        "is_named ? channels_at.planes() : nullptr",
        "nullptr",
        "test_v2.py::test_programs_as_accurate_as_pytorch",
    ),
    Mutant(
        "v2 in place: a step whose image is whole hands it on in strips",
        SCHEDULE + "step.h",
        "is_cut[i - 1] && is_cut[i]",
        "is_cut[i]",
        "test_v2.py::test_large_planes_stay_in_place",
    ),
    Mutant(
        "v2's shortcut: the row above a strip is taken for one outside of the image",
        KERNELS + "depthwise.h",
        "copy(x_above, pixel(in.image.begin), width)",
        "clear(pixel(in.image.begin), width)",
        "test_v2.py::test_threads_change_nothing",
    ),
    Mutant(
        "v2's pairs: the channels of odd numbers are those before them",
        KERNELS + "format_pairs.h",
        "row % 2 ? Pairs::second(pairs) : Pairs::first(pairs)",
        "Pairs::first(pairs)",
        "test_pairs.py",
    ),
    Mutant(
        "v2's pairs: parts of unequal numbers of channels are paired",
        KERNELS + "table.h",
        "unit.result_channels() == 2 * unit.out_channels",
        "true",
        "test_pairs.py",
    ),
    Mutant(
        "the matcher of v2: the two branches need not read the same tensor",
        "shufflenet_ext/_match_v2.py",
        "shortcut.input != main.input",
        "False",
        "test_match_v2.py::test_near_misses_are_left_and_told_of",
    ),
    Mutant(
        "the matcher of v2: any channels are halves of a tensor",
        "shufflenet_ext/_match_v2.py",
        "if x in graph.holders:",
        "if True:",
        "test_match_v2.py::test_near_misses_are_left_and_told_of",
    ),
    Mutant(
        "the matcher of v2: a unit that shuffles its input begins with what is shuffled",
        "shufflenet_ext/_match_v2.py",
        "return next((at for at in found if at[0].only() in graph.inputs), found[0])",
        "return found[0]",
        "test_match_v2.py::test_random_styles",
    ),
    Mutant(
        "the matcher of v2: what else reads a unit's result is not asked",
        "shufflenet_ext/_network.py",
        "if same and readers.are_all_inside(operations, units[-1].end):",
        "if same:",
        "test_match_v2.py::test_a_backbone_of_which_several_results_are_wanted",
    ),
    # ---- The example that trains
    Mutant(
        "a checkpoint is written in the place of the last one",
        "examples/train.py",
        'aside = path.with_name(path.name + ".partial")',
        "aside = path",
        "test_train_example.py::test_a_run_that_is_killed_as_it_writes",
    ),
    Mutant(
        "a run goes on at the start of an epoch, whatever its checkpoint says",
        "examples/train.py",
        "list(sampler)[place * batch : steps_per_epoch * batch]",
        "list(sampler)[: steps_per_epoch * batch]",
        "test_train_example.py::test_a_run_that_is_killed_as_it_writes",
    ),
    Mutant(
        "how an image is moved depends on what was drawn before",
        "examples/train.py",
        "random_of(self._seed, epoch, index)",
        "random.Random()",
        "test_train_example.py::test_a_run_that_is_killed_as_it_writes",
    ),
    Mutant(
        "the losses of an epoch's first steps are not in a checkpoint",
        "examples/train.py",
        'state["step"], state["totals"], state["history"]',
        'state["step"], self.totals, state["history"]',
        "test_train_example.py::test_a_run_that_is_killed_as_it_writes",
    ),
    # ---- Python
    Mutant(
        "build_info asks a card, and initialises CUDA's driver, before torch does",
        "shufflenet_ext/_native.py",
        "    if not torch.cuda.is_initialized():\n",
        "    if not torch.cuda.device_count():\n",
        "test_cuda_launch.py::test_cards_are_asked_once_torch_has_initialised_cuda",
    ),
    Mutant(
        "a wrong stride of a fake kernel: a result for channels last is contiguous",
        "shufflenet_ext/ops.py",
        "_native.memory_format(x) if dims == 4 else torch.contiguous_format",
        "torch.contiguous_format",
        "test_kernels.py::test_result_has_the_layout_and_strides_of_the_fake_kernel",
    ),
    Mutant(
        "a wrong stride of a fake kernel: an x of one pixel counts as channels last",
        "shufflenet_ext/_native.py",
        "not x.is_contiguous() and x.stride(1) == 1",
        "x.stride(1) == 1",
        "test_kernels.py::test_result_has_the_layout_and_strides_of_the_fake_kernel test_dispatcher.py",
    ),
    Mutant(
        "autocast casts float64 as well",
        "shufflenet_ext/ops.py",
        "value.dtype != torch.float64 and not keeps_dtype",
        "not keeps_dtype",
        "test_dispatcher.py::test_autocast_leaves_float64_alone",
    ),
    Mutant(
        "autocast casts batch norms as well",
        "shufflenet_ext/ops.py",
        'argument.name.startswith("bn")',
        "False",
        "test_dispatcher.py::test_autocast_casts_as_for_convolutions",
    ),
    Mutant(
        "a wrong stride of a decomposition: that of the reference",
        "shufflenet_ext/ops.py",
        "return y.contiguous(memory_format=_memory_format(x, y.dim()))",
        "return y",
        "test_dispatcher.py::test_strides_of_symbolic_sizes",
    ),
    Mutant(
        "fx: hooks run when a graph is traced, and again in its node",
        "shufflenet_ext/modules.py",
        "module is tracer.root or has_hooks(module)",
        "module is tracer.root",
        "test_fx.py::test_hooks_run_once",
    ),
    Mutant(
        "a batch norm of the batch's statistics is taken for one that keeps them",
        "shufflenet_ext/modules.py",
        "norm.running_mean is None or norm.running_var is None",
        "False",
        "test_norms.py::test_without_statistics_our_own_unit_is_the_plain_one",
    ),
    Mutant(
        "a norm that convert_sync_batchnorm put there is taken for a change",
        "shufflenet_ext/_fused.py",
        "type(norm) is nn.BatchNorm2d and type(synced) is nn.SyncBatchNorm",
        "False",
        "test_norms.py::test_norms_converted_behind_fuse",
    ),
    Mutant(
        "units that are fused already are not seen in a captured model",
        "shufflenet_ext/_graph.py",
        'use_backend("reference")',
        'use_backend("native")',
        "test_norms.py::test_whole_models",
    ),
    Mutant(
        "a check that no longer refuses: groups that do not divide",
        "shufflenet_ext/_checks.py",
        "divisor < 1 or value % divisor != 0",
        "divisor < 1",
        "test_errors.py test_modules.py::test_constructor_refuses_with_a_reason",
    ),
    Mutant(
        "a check that no longer refuses: weights of another dtype",
        "shufflenet_ext/_checks.py",
        "tensor.dtype != x.dtype",
        "False",
        "test_errors.py",
    ),
    Mutant(
        "a fold with another eps than the batch norm's",
        "shufflenet_ext/_fold.py",
        "torch.rsqrt(var + eps)",
        "torch.rsqrt(var + 1e-5)",
        "test_inference.py::test_every_batch_norm_is_folded_with_its_own_eps",
    ),
    Mutant(
        "the head's window: the whole plane for CIFAR's networks as well",
        "shufflenet_ext/models.py",
        "max_pool=False, window=4",
        "max_pool=False, window=0",
        "test_inference.py::test_images_of_more_pixels_than_the_heads_window",
    ),
    Mutant(
        "a stale fold: a unit with hooks is folded, which then no longer run",
        "shufflenet_ext/_fused.py",
        "    if has_hooks(module):\n",
        "    if False:\n",
        "test_inference.py::test_units_that_are_more_than_their_weights_are_not_folded",
    ),
    Mutant(
        "a stale plan: a network's op goes on with modules that were replaced",
        "shufflenet_ext/_chain.py",
        "if not isinstance(plan, Plan) or not plan.unchanged():",
        "if not isinstance(plan, Plan):",
        "test_chain.py::test_nothing_is_stale",
    ),
    Mutant(
        "a stale plan: a forward put on a module of a network is not called",
        "shufflenet_ext/_chain.py",
        'not any("forward" in values for _, values in self.reads)',
        "True",
        "test_chain.py::test_a_network_that_is_more_than_its_parts_runs_module_by_module",
    ),
    Mutant(
        "torch.compile: a stride that depends on the sizes is taken for what it is at some",
        "shufflenet_ext/_compile.py",
        'any(isinstance(node.meta.get("val"), torch.SymInt) for node in operation.node.all_input_nodes)',
        "False",
        "test_compile_backend.py::test_what_depends_on_the_sizes_is_left_to_inductor",
    ),
    Mutant(
        "a stale plan: hooks inside a network no longer run",
        "shufflenet_ext/_fused.py",
        "values |= {name: {} for name in HOOKS}",
        "pass",
        "test_chain.py::test_a_network_that_is_more_than_its_parts_runs_module_by_module",
    ),
    Mutant(
        "a network runs as one op, which has no gradients, where gradients are wanted",
        "shufflenet_ext/_chain.py",
        "not torch.is_grad_enabled()",
        "True",
        "test_chain.py::test_gradients_autocast_and_tracing_take_it_module_by_module",
    ),
    Mutant(
        "fuse takes a convolution of features for a stem",
        "shufflenet_ext/fusion.py",
        "channels > _MOST_STEM_CHANNELS",
        "False",
        "test_chain.py::test_a_convolution_of_features_is_no_stem",
    ),
    Mutant(
        "a frozen batch norm is taken for one in training",
        "shufflenet_ext/modules.py",
        "any(norm.training for _, norm in pairs)",
        "self.training",
        "test_modules.py::test_frozen_batch_norm_inside_a_training_unit",
    ),
    Mutant(
        "the second batch norm gets the first one's eps",
        "shufflenet_ext/modules.py",
        "bn2_eps=self.bn2.eps",
        "bn2_eps=self.bn1.eps",
        "test_modules.py",
    ),
    Mutant(
        "fuse swaps units that compute something else",
        "shufflenet_ext/fusion.py",
        "if difference <= _TOLERANCE:",
        "if difference < float('inf'):",
        "test_fuse.py",
    ),
    Mutant(
        "a cause of a fallback is warned of each time",
        "shufflenet_ext/_backend.py",
        "        _warned.add(cause)\n",
        "",
        "test_backend.py",
    ),
    # ---- Training
    Mutant(
        "training: the taps are not turned about on the way back",
        KERNELS + "training.h",
        "S::broadcast(weight[8 - i])",
        "S::broadcast(weight[i])",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: a mask: sums take in lanes behind the last pixel",
        KERNELS + "training.h",
        "S::keep(deviation, S::first(n))",
        "deviation",
        "test_training.py::test_planes",
    ),
    Mutant(
        "training: products are of b, not of what it lies above its mean",
        KERNELS + "plane_products.h",
        "block[i] -= S::broadcast(offset[i])",
        "block[i] -= typename S::V{}",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: the products of the last pixels are not added up",
        TRAINING + "passes.cpp",
        "in_sums < kPixelsOfSums && (n + 1 < p.a.images || block.end < pixels)",
        "in_sums < kPixelsOfSums",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: the first group's planes are multiplied with all groups'",
        TRAINING + "passes.cpp",
        "tile == tiles.begin || p.group(tile) != p.group(tile - 1)",
        "tile == tiles.begin",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: the shuffle backwards is the shuffle",
        KERNELS + "training_table.h",
        "c % shuffle_groups * (channels / shuffle_groups) + c / shuffle_groups",
        "c % (channels / shuffle_groups) * shuffle_groups + c / (channels / shuffle_groups)",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: the pool's gradient counts padding where the pool does not",
        KERNELS + "training.h",
        "unit.pool_count_include_pad ? 9 : inside(row, in.height) * inside(column, in.width)",
        "int64_t{9}",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training in 16 bits: all groups read the planes that the first one's were converted to",
        KERNELS + "training_pointwise.h",
        "some.begin == rows.begin || some.begin % of_group == 0",
        "some.begin == rows.begin",
        "test_training.py::test_isas",
    ),
    Mutant(
        "training in 16 bits: the residual is that of the rows converted first",
        KERNELS + "training_pointwise.h",
        "static_cast<const T*>(p_.residual) + row * p_.pixels",
        "static_cast<const T*>(p_.residual) + (row - rows.begin) * p_.pixels",
        "test_training.py::test_planes_that_are_worked_on_in_parts",
    ),
    Mutant(
        "training in bfloat16: products of pairs of pixels are of b, not of what it lies above its mean",
        KERNELS + "training_pairs.h",
        "Stored<BFloat16>::load(from + begin) - shift",
        "Stored<BFloat16>::load(from + begin) - S::V{}",
        "test_training.py::test_planes_that_are_worked_on_in_parts",
    ),
    Mutant(
        "training in bfloat16: a bias makes up for weights that are not rounded",
        TRAINING + "tensors.h",
        "static_cast<float>(half)",
        "static_cast<float>(of_row[k])",
        "test_training.py::test_means_behind_the_last_norm_where_conv3_reads_large_means",
    ),
    Mutant(
        "training in channels_last: a share of an image's channels is written from the image's first one",
        TRAINING + "passes.cpp",
        "some.begin * y.pixels() * y.element",
        "0 * some.begin",
        "test_training.py::test_the_threads_do_not_change_a_bit",
    ),
    Mutant(
        "training in channels_last: the gradient's planes take the place of the result's",
        TRAINING + "passes.cpp",
        "memory + bytes_of_result",
        "memory + 0 * bytes_of_result",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: the running variance is the batch's own, not the unbiased one",
        TRAINING + "norm.h",
        "values / (values - 1)",
        "1.0",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: norm 3's gradient forgets that its mean is the batch's",
        TRAINING + "unit_backward.cpp",
        "m[i] * mean_gradient[first + i]",
        "0.0",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: norm 3's gradient is pulled towards the centre by another row's sum",
        TRAINING + "unit_backward.cpp",
        "to[k] *= pull[row]",
        "to[k] *= pull[row % of_group]",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: conv3 with its norm forgets that it is of what y2 lies above its mean",
        TRAINING + "unit_forward.cpp",
        "of_v[k] * centre[k]",
        "0.0",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: matrices that are turned about take the first group's place",
        TRAINING + "matrices.h",
        "(group * columns + first) * rows",
        "first * rows",
        "test_training.py::test_steps",
    ),
    Mutant(
        "training: a frozen norm's mean is that of the convolution with its bias",
        TRAINING + "norm.h",
        "mean[c] -= added[c];",
        "mean[c] -= 0 * added[c];",
        "test_training.py::test_norms_in_eval_mode_or_without_statistics",
    ),
    Mutant(
        "training: each process has the whole gradient of a norm's weight, not its share",
        TRAINING + "norm.h",
        "norm.rstd[c] * sums.with_y[c] / whole.count",
        "norm.rstd[c] * sums.with_y[c]",
        "test_training.py::test_processes_of_equal_batches",
    ),
    Mutant(
        "training: a frozen norm is taken for one of the batch",
        "shufflenet_ext/_training_op.py",
        "of_batch = [uses_batch(stage.norm) for stage in stages]",
        "of_batch = [True for stage in stages]",
        "test_training.py::test_norms_in_eval_mode_or_without_statistics",
    ),
    Mutant(
        "training: a fused unit's running statistics are in the unit's order, not the norm's",
        "shufflenet_ext/_training_op.py",
        "found if stage.order is None else torch.empty_like(found).index_copy_(0, stage.order, found)",
        "found",
        "test_match.py::test_fuse_takes_every_style",
    ),
    Mutant(
        "training a stem: of equal values in a window the last gets the gradient",
        KERNELS + "stem_training.h",
        "(later > first) | (later != later)",
        "(later >= first) | (later != later)",
        "test_stem_training.py::test_of_equal_values_the_first_gets_the_gradient",
    ),
    Mutant(
        "training a stem: a window's left column is its own odd one, not that of the window before",
        KERNELS + "stem_training.h",
        "S::load(left_ + i + 1)",
        "S::load(left_ + i)",
        "test_stem_training.py::test_steps_in_float64",
    ),
    Mutant(
        "training a stem: moments of strips of unequal rows are weighed alike",
        TRAINING + "stem.cpp",
        "static_cast<double>(batch.rows(strip).count() * width)",
        "static_cast<double>(pixels) / static_cast<double>(strips + 0 * strip)",
        "test_stem_training.py::test_images_of_several_strips",
    ),
    Mutant(
        "training a stem: the weight's gradient forgets that the norm's mean is the batch's",
        TRAINING + "norm.h",
        "norm.scale[c] * sums.total[c] / values",
        "0.0",
        "test_stem_training.py::test_steps_in_float64",
    ),
    Mutant(
        "training a stem: the backward pass takes the unbiased variance for the batch's own",
        TRAINING + "stem.cpp",
        "mean + 2 * channels",
        "mean + channels",
        "test_stem_training.py::test_steps_in_float64",
    ),
]


class BrokenMutantError(Exception):
    """Says that a fault could not be planted, which is no matter of the tests."""


def planted(source: str, mutant: Mutant) -> str:
    """The source with the fault in place, or with its switch."""
    if (found := source.count(mutant.old)) != 1:
        raise BrokenMutantError(f"'{mutant.name}': {mutant.file} has `{mutant.old}` {found} times, expected once")
    if not mutant.is_switched:
        return source.replace(mutant.old, mutant.new)
    old, new, end = mutant.old, mutant.new, ""
    if old.endswith(";"):
        old, new, end = old[:-1], new[:-1], ";"
    return source.replace(mutant.old, f"(shufflenet::is_planted({mutant.switch}u) ? ({new}) : ({old})){end}")


# What the switches ask, in a header that all of the library includes.
SWITCHES = """
#include <cstdlib>
namespace shufflenet {
inline const char* const planted_fault = std::getenv("PLANTED_FAULT");
inline const unsigned long switched_on = planted_fault ? std::strtoul(planted_fault, nullptr, 10) : 0;
inline bool is_planted(unsigned long fault) { return fault == switched_on; }
}  // namespace shufflenet
"""
SWITCHES_HEADER = "csrc/unit.h"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the copy, which comes before the installed package. Nothing that Python compiled is kept."""
    everywhere = {"PYTHONPATH": str(COPY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command,
        cwd=COPY,
        env=os.environ | everywhere | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS_OF_A_RUN,
    )


def build_copy() -> None:
    """Brings the copy up to date with the working tree, all switches in place, and builds its library."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [file for file in files if (ROOT / file).is_file()]
    for folder in ("csrc", "shufflenet_ext", "tests"):
        for path in (COPY / folder).rglob("*.*"):
            if str(path.relative_to(COPY)) not in files and path.is_file() and path.suffix != ".so":
                path.unlink()
    for file in files:
        content = (ROOT / file).read_bytes()
        switched = [mutant for mutant in MUTANTS if mutant.file == file and mutant.is_switched]
        for mutant in switched:
            content = planted(content.decode(), mutant).encode()
        if file == SWITCHES_HEADER:
            content = content.replace(b"#pragma once\n", b"#pragma once\n" + SWITCHES.encode())
        if file == "setup.py":  # compiles in half the time, and the tests take no longer
            content = content.replace(b'"-O3"', b'"-O1"')
        target = COPY / file
        if not target.exists() or target.read_bytes() != content:  # else ninja would compile it again
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            shutil.copymode(ROOT / file, target)
    done = run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    if done.returncode != 0:
        raise BrokenMutantError(f"the library with all switches cannot be built:\n{done.stdout[-4000:]}")


PYTEST = ["-m", "pytest", "-x", "-v", "--tb=short", "-p", "no:cacheprovider"]
COMPILER_ERROR = re.compile(r": (?:fatal )?error: ")
TEST = re.compile(r"^(tests/\S+?::.+?)(?: (PASSED|SKIPPED|XFAIL|FAILED|ERROR)\b.*)?$", re.MULTILINE)


def first_failure(tests: list[str], **environment: str) -> str | None:
    """The test that fails first, or None. A crash or a hang leaves it without an answer."""
    try:
        done = run(sys.executable, *PYTEST, *tests, **environment)
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = (error.stdout or b"").decode(), -1
    if code == 0:
        return None
    failed = [test for test, answer in TEST.findall(output) if answer in ("", "FAILED", "ERROR")]
    if (code != 1 and code > 0) or not failed or COMPILER_ERROR.search(output):
        raise BrokenMutantError(f"pytest {' '.join(tests)} ended with {code}:\n{output[-4000:]}")
    return failed[0]


def catch(mutant: Mutant) -> str | None:
    """Plants the fault, and returns the test of the short suite that fails first. The likely ones are run first."""
    likely = [f"tests/{name}" for name in mutant.tests.split()]
    if mutant.is_switched:
        environment = {"PLANTED_FAULT": str(mutant.switch)}
        return first_failure(likely, **environment) or first_failure([], **environment)
    path = COPY / mutant.file
    source = path.read_text()
    path.write_text(planted(source, mutant))
    try:
        return first_failure(likely) or first_failure([])
    finally:
        path.write_text(source)


INTRODUCTION = """# Planted faults

`make mutants` plants these faults, one at a time, and expects the short suite (`make test`) to fail on each of them.
Each is named with a test that fails on it. `tests/mutants.py` holds the faults and writes this table.

| Fault | File | Caught by |
| --- | --- | --- |
"""


def table(caught: dict[str, str]) -> str:
    known = [mutant for mutant in MUTANTS if mutant.name in caught]
    rows = [f"| {mutant.name} | `{mutant.file}` | `{caught[mutant.name].split('[')[0]}` |\n" for mutant in known]
    return INTRODUCTION + "".join(rows)


def recorded() -> dict[str, str]:
    """The table's tests, by their faults."""
    return dict(re.findall(r"^\| (.+?) \| `.+?` \| `(.+?)` \|$", TABLE.read_text(), re.MULTILINE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help="plant only the faults whose names contain this")
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.relative_to(ROOT)}")
    parser.add_argument("--missing", action="store_true", help="plant what the table lacks, and add it there")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.names or any(n in mutant.name for n in arguments.names)]
    if arguments.missing:
        chosen = [mutant for mutant in chosen if mutant.name not in recorded()]
        if not chosen:
            print("the table lacks none of them")
            return 0
    if not chosen or (arguments.write and chosen != MUTANTS):
        parser.error("name: got none that a fault has" if not chosen else "--write: got names, expected none")
    start = time.monotonic()
    caught: dict[str, str] = {}
    try:
        for mutant in MUTANTS:
            planted((ROOT / mutant.file).read_text(), mutant)
        build_copy()
        print(f"built in {time.monotonic() - start:.0f} s", flush=True)
        for mutant in chosen:
            if test := catch(mutant):
                caught[mutant.name] = test
            minutes = (time.monotonic() - start) / 60
            print(f"{minutes:5.1f} min  {mutant.name}: {test or 'SURVIVED the short suite'}", flush=True)
        # A test that fails anyway catches nothing.
        if caught and (test := first_failure(sorted(set(caught.values())))):
            raise BrokenMutantError(f"{test} fails without a fault")
    except BrokenMutantError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(caught)} of {len(chosen)} faults were caught")
    if arguments.missing:
        TABLE.write_text(table(recorded() | caught))
    if len(caught) < len(chosen):
        return 1
    if arguments.write:
        TABLE.write_text(table(caught))
    return 0


if __name__ == "__main__":
    sys.exit(main())
