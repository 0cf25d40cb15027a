// Steps along rays through a multi-level occupancy grid (the cascades of Müller et al. 2022), which leap over empty
// cells.
//
// The steps of a ray do not depend on the grid: their edges are t_0 = near, t_{k+1} = t_k + clamp(cone * t_k, step_min,
// step_max), the last one far; jitter moves each inner edge by up to half a step either way, so that the steps still
// tile [near, far]. A step is kept if the cell at its midpoint is occupied, in the finest level whose box holds that
// point and whose cells are not shorter than the step. Leaping only saves asking: it ends safely before the empty cell
// does, or the empty block of 8^3 cells. (From 32 cells on, the box of the next finer level, the middle half, is made
// of whole blocks.)
//
// Sums of products are written as fma, so that no compiler rounds them its own way: with a fixed step CPU and GPU agree
// to the last bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "counter_rng.h"
#include "intersect.h"

namespace factorkit {

template <class S>  // float or double
struct March {
    Rays<S> rays;
    const S *near, *far;             // [rays]
    const std::uint8_t* occupancy;   // [levels, resolution^3 / 8]: bit i of byte j is cell 8j+i, x slowest, z fastest
    const std::uint8_t* blocks;      // [levels, (resolution / 8)^3]: zero where all 8^3 cells are empty; or null
    int levels, resolution;          // a power of two, at least 8; at least 32 with blocks
    S centre[3], half[3];            // of level 0's box; level l is 2^l times as large about the same centre
    S step_min, step_max, cone;      // in units of t
    const std::int64_t* seed;        // one number, from 0, where the rays are; or null: no jitter
};

template <class S>
struct MarchOutputs {
    const std::int64_t* offsets;  // [rays + 1]: where each ray's samples go; what lies beyond `size` is left out
    std::int64_t size;
    S *t_start, *t_end;           // [size]; zero where no ray's samples go
    std::int64_t* ray;            // [size]; the ray of each sample
};

template <class S>
void march_count(const March<S>& problem, std::int64_t* counts, int threads);  // counts: [rays]
template <class S>
void march_write(const March<S>& problem, const MarchOutputs<S>& out, int threads);

// The same on the current CUDA device. Throws std::runtime_error if a launch fails. In builds with CUDA only.
template <class S>
void march_count_cuda(const March<S>& problem, std::int64_t* counts, void* stream);
template <class S>
void march_write_cuda(const March<S>& problem, const MarchOutputs<S>& out, void* stream);

// A ray on its way, and what would otherwise be worked out at every step.
template <class S>
struct Course {
    std::int64_t ray;
    S near, far;
    const S *origin, *direction;
    S per_direction[3], per_half[3];  // reciprocals
    S cell_size, speed, per_step;     // shortest side of a cell of level 0; length of the direction; 1 / step_min
    S slack[3];                       // by which rounding may move a point of the outer faces, in cells of level 0
    S margin;                         // far more than rounding can move a face or a point of level 0 by
};

// One step of a ray: its edges before jitter, and the size of the step before it.
template <class S>
struct Step {
    std::int64_t index;
    S start, end, previous;
};

template <class S>
FACTORKIT_HOST_DEVICE S step_size(const March<S>& p, S t) {
    const S size = p.cone * t;
    return size < p.step_min ? p.step_min : size > p.step_max ? p.step_max : size;
}

template <class S>
FACTORKIT_HOST_DEVICE Step<S> step_at(const March<S>& p, S near, std::int64_t index) {  // of a fixed size
    return {index, std::fma(S(index), p.step_min, near), std::fma(S(index + 1), p.step_min, near), p.step_min};
}

template <class S>
FACTORKIT_HOST_DEVICE Step<S> first_step(const March<S>& p, S near) {
    return p.cone == S(0) ? step_at(p, near, 0) : Step<S>{0, near, near + step_size(p, near), S(0)};
}

template <class S>
FACTORKIT_HOST_DEVICE Step<S> next_step(const March<S>& p, S near, const Step<S>& step) {
    if (p.cone == S(0)) return step_at(p, near, step.index + 1);
    return {step.index + 1, step.end, step.end + step_size(p, step.end), step.end - step.start};
}

// The first step after `step` that ends beyond t; with growing steps also the first longer than `longest`.
template <class S>
FACTORKIT_HOST_DEVICE Step<S> leap(const March<S>& p, const Course<S>& c, Step<S> step, S t, S longest) {
    if (p.cone == S(0)) {
        const S index = (t - c.near) * c.per_step;  // cut off below, and margins are wide
        const bool ahead = index > S(step.index + 1) && index < S(1e15);
        return step_at(p, c.near, ahead ? std::int64_t(index) : step.index + 1);
    }
    do {
        step = next_step(p, c.near, step);
    } while (step.end <= t && step.end > step.start && step.end - step.start <= longest);
    return step;
}

// The edge at t, where step `index` starts and one of size `previous` ends.
template <class S>
FACTORKIT_HOST_DEVICE S jittered(const March<S>& p, const Course<S>& c, std::int64_t index, S t, S previous) {
    if (!p.seed || index == 0 || t >= c.far) return t < c.far ? t : c.far;
    const S u = S(counter_uniform(std::uint64_t(*p.seed), std::uint64_t(c.ray), std::uint64_t(index)));
    const S moved = std::fma(u - S(0.5), previous, t);
    return moved < c.far ? moved : c.far;
}

// How far rounding may move a point of a face of level 0's box, relative to half the box.
template <class S>
FACTORKIT_HOST_DEVICE S face_slack(S centre, S half) {
    const S size = centre < S(0) ? -centre : centre;
    return S(4) * std::numeric_limits<S>::epsilon() * (S(1) + S(2) * size / half);
}

// The cell at a point, as asked for by a step of this length in space.
template <class S>
struct Cell {
    bool inside, occupied;
    int at[3], width;  // first corner in cells of the level, and how many it spans: 1, or 8 for an empty block
    S scale;           // 2^level
};

template <class S>
FACTORKIT_HOST_DEVICE Cell<S> find_cell(const March<S>& p, const Course<S>& c, S t, S length) {
    S q[3], reach = 0;
    for (int a = 0; a < 3; ++a) {
        q[a] = (std::fma(t, c.direction[a], c.origin[a]) - p.centre[a]) * c.per_half[a];
        const S size = q[a] < S(0) ? -q[a] : q[a];
        reach = size > reach ? size : reach;
    }
    Cell<S> cell{true, false, {0, 0, 0}, 1, S(1)};
    int level = 0;
    S smaller = 1;
    while (level + 1 < p.levels && (reach >= cell.scale || c.cell_size * cell.scale < length)) {
        ++level;
        cell.scale *= S(2);
        smaller *= S(0.5);
    }
    for (int a = 0; a < 3; ++a) {
        const S place = std::fma(q[a], smaller, S(1)) * S(p.resolution / 2);
        const S slack = c.slack[a] * smaller;
        cell.inside = cell.inside && place >= -slack && place <= S(p.resolution) + slack;  // faces belong to the box
        const int at = cell.inside ? int(place) : 0;
        cell.at[a] = at < p.resolution ? at : p.resolution - 1;
    }
    if (!cell.inside) return cell;
    const std::int64_t r = p.resolution, b = r / 8;
    if (p.blocks && !p.blocks[((level * b + cell.at[0] / 8) * b + cell.at[1] / 8) * b + cell.at[2] / 8]) {
        for (int a = 0; a < 3; ++a) cell.at[a] &= ~7;
        cell.width = 8;
        return cell;
    }
    const std::int64_t bit = ((level * r + cell.at[0]) * r + cell.at[1]) * r + cell.at[2];
    cell.occupied = p.occupancy[bit >> 3] >> (bit & 7) & 1;
    return cell;
}

// Where the ray leaves the cell.
template <class S>
FACTORKIT_HOST_DEVICE S cell_exit(const March<S>& p, const Course<S>& c, const Cell<S>& cell) {
    S exit = S(INFINITY);
    const S width = S(2) / S(p.resolution);
    for (int a = 0; a < 3; ++a) {
        const S face = std::fma(S(cell.at[a] + (c.direction[a] > S(0) ? cell.width : 0)), width, S(-1)) * cell.scale;
        const S t = (std::fma(face, p.half[a], p.centre[a]) - c.origin[a]) * c.per_direction[a];
        exit = c.direction[a] != S(0) && t < exit ? t : exit;
    }
    return exit;
}

// Calls emit(start, end) for each kept step, in order, until it returns false.
template <class S, class Emit>
FACTORKIT_HOST_DEVICE void march_ray(const March<S>& p, std::int64_t ray, Emit emit) {
    const S *origin = p.rays.origins + 3 * ray, *direction = p.rays.directions + 3 * ray;
    Course<S> c{ray, p.near[ray], p.far[ray], origin, direction, {}, {}, S(INFINITY), S(0), S(1) / p.step_min, {}, S(0)};
    const S largest = S(1 << (p.levels - 1)), *d = c.direction;
    Box<S> reach;
    for (int a = 0; a < 3; ++a) {
        c.per_direction[a] = S(1) / d[a];
        c.per_half[a] = S(1) / p.half[a];
        const S moved = face_slack(p.centre[a], p.half[a]);
        reach.lower[a] = std::fma(-largest, p.half[a] * (S(1) + moved), p.centre[a]);
        reach.upper[a] = std::fma(largest, p.half[a] * (S(1) + moved), p.centre[a]);
        c.slack[a] = moved * S(p.resolution / 2);
        const S size = p.half[a] / S(p.resolution / 2);
        c.cell_size = size < c.cell_size ? size : c.cell_size;
    }
    const Crossing<S> box = cross_box(c.origin, d, reach);
    if (!(box.far > box.near && c.far > c.near && c.near - c.near == S(0))) return;
    c.speed = std::sqrt(std::fma(d[0], d[0], std::fma(d[1], d[1], d[2] * d[2])));
    c.margin = S(0.01) * c.cell_size / c.speed;
    // Jitter may move the start of the last step, which far cuts off, and its midpoint by half as much.
    const S early = p.seed ? S(0.25) : S(0), last = box.far + c.margin;

    Step<S> step = first_step(p, c.near);
    if (step.end <= box.near - c.margin) step = leap(p, c, step, box.near - c.margin, S(INFINITY));
    std::int64_t known = -1;  // the edge that `end` holds, so that steps side by side draw it once
    S end = 0;
    while (step.start < c.far && step.start - early * step.previous < last && step.end > step.start) {
        const S size = step.end - step.start;
        const S start = known == step.index ? end : jittered(p, c, step.index, step.start, step.previous);
        known = step.index + 1;
        end = jittered(p, c, known, step.end, p.cone == S(0) ? p.step_min : size);
        const Cell<S> cell = find_cell(p, c, S(0.5) * (start + end), size * c.speed);
        if (cell.occupied && end > start && !emit(start, end)) return;
        if (cell.inside && !cell.occupied) {
            const S longest = cell.scale == largest ? S(INFINITY) : c.cell_size * cell.scale / c.speed;
            step = leap(p, c, step, cell_exit(p, c, cell) - c.margin * cell.scale, longest);
        } else {
            step = next_step(p, c.near, step);
        }
    }
}

template <class S>
FACTORKIT_HOST_DEVICE std::int64_t count_ray(const March<S>& p, std::int64_t ray) {
    std::int64_t count = 0;
    march_ray(p, ray, [&](S, S) {
        ++count;
        return true;
    });
    return count;
}

template <class S>
FACTORKIT_HOST_DEVICE void write_ray(const March<S>& p, const MarchOutputs<S>& out, std::int64_t ray) {
    std::int64_t at = out.offsets[ray];
    const std::int64_t end = out.offsets[ray + 1] < out.size ? out.offsets[ray + 1] : out.size;
    if (at < 0 || at >= end) return;
    march_ray(p, ray, [&](S start, S stop) {
        out.t_start[at] = start;
        out.t_end[at] = stop;
        out.ray[at] = ray;
        return ++at < end;
    });
}

// A sample that no ray reaches: it has no length and is the first ray's, so that whoever looks its ray up finds one.
template <class S>
FACTORKIT_HOST_DEVICE void clear_sample(const MarchOutputs<S>& out, std::int64_t i) {
    out.t_start[i] = out.t_end[i] = S(0);
    out.ray[i] = 0;
}

}  // namespace factorkit
