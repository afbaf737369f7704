"""Occupancy and floors against figures worked out by hand or published."""

import pytest

from mixft.kernels import adamw
from mixft.kernels.architecture import ARCHITECTURES
from mixft.kernels.occupancy import occupancy
from mixft.kernels.traffic import bytes_per_element, estimate, tiling
from mixft.kernels.variant import Elementwise, MatrixProduct

KIB = 1024


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared_memory", "programs", "warps", "limits"),
    [
        # CUDA C++ best practices guide, "calculating occupancy": blocks of 128 and of 320 threads with 37 registers.
        ("sm_80", 4, 37, 0, 12, 48, ("registers",)),
        ("sm_80", 10, 37, 0, 4, 40, ("registers",)),
        # The same guide: 32 registers a thread are the most that leave room for 2048 threads.
        ("sm_90", 8, 32, 0, 8, 64, ("warps", "registers")),
        ("sm_90", 8, 33, 0, 6, 48, ("registers",)),
        # 65536 registers hold one program of 256 threads with 255, two with 128.
        ("sm_90", 8, 255, 0, 1, 8, ("registers",)),
        ("sm_90", 8, 128, 0, 2, 16, ("registers",)),
        # Shared memory a multiprocessor: 228, 164, 100 KiB, of which each program takes one more than it asks for.
        ("sm_90", 4, 32, 113 * KIB, 2, 8, ("shared memory",)),
        ("sm_90", 4, 32, 114 * KIB, 1, 4, ("shared memory",)),
        ("sm_80", 4, 32, 81 * KIB, 2, 8, ("shared memory",)),
        ("sm_80", 4, 32, 81 * KIB + 1, 1, 4, ("shared memory",)),
        ("sm_86", 4, 32, 49 * KIB, 2, 8, ("shared memory",)),
        ("sm_75", 4, 32, 32 * KIB, 2, 8, ("shared memory",)),
        ("sm_90", 4, 32, 228 * KIB, 0, 0, ("shared memory",)),
        # Most programs at a time: 32, 16 and 24.
        ("sm_90", 1, 32, 0, 32, 32, ("programs",)),
        ("sm_86", 1, 32, 0, 16, 16, ("programs",)),
        ("sm_89", 1, 32, 0, 24, 24, ("programs",)),
        # AMD's waves a SIMD by vector registers on CDNA: 64 or fewer 8, 72 7, 80 6, 96 5, 128 4, 168 3, 256 2, 512 1.
        ("gfx942", 4, 64, 0, 8, 32, ("warps", "registers")),
        ("gfx942", 4, 65, 0, 7, 28, ("registers",)),
        ("gfx942", 4, 80, 0, 6, 24, ("registers",)),
        ("gfx942", 4, 96, 0, 5, 20, ("registers",)),
        ("gfx942", 4, 128, 0, 4, 16, ("registers",)),
        ("gfx942", 4, 168, 0, 3, 12, ("registers",)),
        ("gfx942", 4, 256, 0, 2, 8, ("registers",)),
        ("gfx942", 4, 512, 0, 1, 4, ("registers",)),
        # 64 KiB of local data share a compute unit, nothing reserved.
        ("gfx942", 4, 32, 32 * KIB, 2, 8, ("shared memory",)),
        ("gfx942", 4, 32, 32 * KIB + 1, 1, 4, ("shared memory",)),
    ],
)
def test_programs_that_a_multiprocessor_holds(arch, num_warps, registers, shared_memory, programs, warps, limits):
    found = occupancy(ARCHITECTURES[arch], num_warps, registers, shared_memory)
    assert (found.programs, found.warps, found.limits) == (programs, warps, limits)
    assert found.fraction == warps / ARCHITECTURES[arch].multiprocessor.warps


def test_tensor_memory_is_512_columns():
    assert occupancy(ARCHITECTURES["sm_100"], 4, 32, 0, tensor_memory=256).programs == 2
    assert occupancy(ARCHITECTURES["sm_100"], 4, 32, 0, tensor_memory=257).limits == ("tensor memory",)


def test_every_architecture_can_hold_the_most_shared_memory_that_a_program_may_use():
    for arch in ARCHITECTURES.values():
        assert occupancy(arch, 4, 32, arch.shared_memory).programs == 1, arch.name


LOOP = """
module {
  tt.func public @kernel(%x: !tt.ptr<f16> {tt.divisibility = 16 : i32} loc("x"(#loc)), %n: i32 loc("n"(#loc))) {
    %size = tt.load %n : !tt.ptr<i64> loc(#loc9)
    %scale = tt.load %s, %m : tensor<64x!tt.ptr<f32>> loc(#loc9)
    %0 = scf.if %1 -> (tensor<1024xi32>) {
      %2 = scf.for %i = %c0 to %n step %c1 iter_args(%bad = %c) -> (tensor<1024xi32>)  : i32 {
        %a = tt.load %p : tensor<1024x!tt.ptr<f16>> loc(#loc1)
        %b = "tt.reduce"(%a) <{axis = 0 : i32}> ({
        ^bb0(%c: i32 loc(unknown), %d: i32 loc(unknown)):
          tt.reduce.return %5 : i32 loc(#loc)
        }) : (tensor<1024xi32>) -> i32 loc(#loc)
        tt.store %p, %a, %mask : tensor<1024x!tt.ptr<f16>> loc(#loc2)
        scf.yield %bad : tensor<1024xi32> loc(#loc)
      } loc(#loc3)
      scf.yield %2 : tensor<1024xi32> loc(#loc)
    } else {
      %3 = scf.for %i = %c0 to %n step %c1 -> (tensor<1024xi32>)  : i32 {
        %a = tt.load %p, %mask, %other : tensor<1024x!tt.ptr<f16>> loc(#loc1)
      } loc(#loc3)
    } loc(#loc4)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


def test_bytes_of_the_loop_that_moves_the_most():
    assert bytes_per_element(LOOP, 1024) == 4
    assert bytes_per_element(LOOP, 512) == 8


def test_bytes_of_a_kernel_without_a_loop():
    straight = """
  tt.func public @kernel(%x: !tt.ptr<f16> loc("x"(#loc))) attributes {noinline = false} {
    %a = tt.load %p, %mask : tensor<8x256x!tt.ptr<bf16>, #blocked> loc(#loc1)
    %b = tt.load %q : tensor<256x!tt.ptr<f32>> loc(#loc1)
    tt.store %p, %a, %mask : tensor<8x256x!tt.ptr<i8>> loc(#loc2)
  } loc(#loc)
"""
    assert bytes_per_element(straight, 2048) == 2 + 1 + 4 / 8


def test_bytes_of_the_innermost_loop():
    """What a program does once, after its main loop, may move more in an iteration."""
    nested = """
  tt.func public @kernel(%x: !tt.ptr<f16> loc("x"(#loc))) attributes {noinline = false} {
    scf.for %i = %c0 to %n step %c1  : i32 {
      scf.for %j = %c0 to %n step %c1  : i32 {
        %a = tt.load %p : tensor<64x!tt.ptr<bf16>> loc(#loc1)
      } loc(#loc)
      scf.for %j = %c0 to %n step %c1  : i32 {
        %bit = arith.addi %a, %b : tensor<64xi32> loc(#loc1)
        scf.for %k = %c0 to %n step %c1  : i32 {
          %bit = arith.addi %a, %b : tensor<64xi32> loc(#loc1)
        } loc(#loc)
      } loc(#loc)
    } loc(#loc)
    scf.for %i = %c0 to %n step %c1  : i32 {
      %a = tt.load %p : tensor<256x!tt.ptr<i64>> loc(#loc1)
    } loc(#loc)
  } loc(#loc)
"""
    assert bytes_per_element(nested, 64) == 2


def test_bytes_of_branches_within_a_loop():
    """One branch is taken: the one that moves more counts. A while loop's condition belongs to its body."""
    branches = """
    %0 = scf.while (%a = %b) : (i32) -> i32 {
      %g = tt.load %p : tensor<128x!tt.ptr<i8>> loc(#loc1)
    } do {
      scf.if %1 {
        %g = tt.load %p : tensor<128x!tt.ptr<f32>> loc(#loc1)
      } else {
        %g = tt.load %p : tensor<128x!tt.ptr<f16>> loc(#loc1)
      } loc(#loc)
      scf.if %1 {
        tt.store %p, %g : tensor<128x!tt.ptr<i1>> loc(#loc1)
      } loc(#loc)
    } loc(#loc)
"""
    assert bytes_per_element(branches, 128) == 1 + 4 + 1


def test_floors_at_published_rates():
    gpu = ARCHITECTURES["sm_90"].gpu
    found = estimate(Elementwise(1024, 28), gpu)
    assert (found.problem, found.compute_seconds) == (100_000_000, 0)
    assert found.seconds == found.memory_seconds == pytest.approx(2.8e9 / 3.35e12)

    large = estimate(MatrixProduct((128, 256, 64), (2, 2, 2)), gpu)
    assert large.seconds == large.compute_seconds == pytest.approx(2 * 4096**3 / 989.4e12)
    assert large.memory_seconds == pytest.approx(3 * 2 * 4096**2 / 3.35e12)

    decode = estimate(MatrixProduct((16, 64, 256), (1, 1, 2), (16, 4096, 8192), int8=True), gpu)
    assert decode.compute_seconds == pytest.approx(2 * 16 * 4096 * 8192 / 1978.9e12)
    assert decode.seconds == decode.memory_seconds == pytest.approx((16 * 8192 + 4096 * 8192 + 2 * 16 * 4096) / 3.35e12)


@pytest.mark.parametrize(
    ("variant", "bytes_moved"),
    [
        # Gradient, then weight and two moments read and written: 4 + 2 (4 + 4 + 4).
        ("adam[fp32,fp32,none master,fp32 state,decoupled,unscaled]", 28),
        # Gradient, master and moments, and the 16-bit parameter written only: 2 + 2 (4 + 4 + 4) + 2.
        ("adam[fp16,fp16,fp32 master,fp32 state,decoupled]", 28),
        # Gradient, then parameter, remainder, two codes and two scales of 32 elements: 2 + 2 (2 + 2 + 1 + 1 + 2 / 32).
        ("adam[bf16,bf16,split master,code state,decoupled]", 14.125),
        ("adam[bf16,bf16,none master,code state,decoupled,stochastic]", 10.125),
    ],
)
def test_the_floor_of_a_step_counts_every_tensor_once(variant, bytes_moved):
    work = {found.name: found.work for found in adamw.variants(ARCHITECTURES["sm_90"])}
    assert work[variant].floor_bytes == bytes_moved


def test_tiles_over_multiprocessors():
    gpu = ARCHITECTURES["sm_90"].gpu
    found = tiling(MatrixProduct((128, 256, 64), (2, 2, 2)), gpu, 1)
    assert found.intensity == pytest.approx(2 * 128 * 256 / (2 * 384))
    assert (found.programs, found.waves) == (512, 512 / 132)
    assert found.busy == pytest.approx(512 / 132 / 4)
    few = tiling(MatrixProduct((16, 64, 256), (2, 1, 2), (16, 4096, 4096)), gpu, 3)
    assert (few.programs, few.busy) == (64, 64 / 132)
    ragged = tiling(MatrixProduct((128, 128, 64), (2, 2, 2), (129, 129, 64)), gpu, 2)
    assert ragged.programs == 4
