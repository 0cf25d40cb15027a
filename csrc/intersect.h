// Where rays o + t d, t >= 0, enter and leave a box. A miss is the empty interval near = far = 0.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace factorkit {

template <class S>  // float or double
struct Rays {
    const S* origins;     // [count, 3]
    const S* directions;  // [count, 3], of any length but zero
    std::int64_t count;
};

template <class S>
struct Box {
    S lower[3];
    S upper[3];
};

template <class S>
void intersect(const Rays<S>& rays, const Box<S>& box, S* near, S* far, int threads);  // near, far: [count]

// Gradients [count, 3] for origins and directions from those for near and far.
template <class S>
void intersect_backward(const Rays<S>& rays, const Box<S>& box, const S* d_near, const S* d_far, S* d_origins,
                        S* d_directions, int threads);

// The same on the current CUDA device. Throws std::runtime_error if a launch fails. In builds with CUDA only.
template <class S>
void intersect_cuda(const Rays<S>& rays, const Box<S>& box, S* near, S* far, void* stream);
template <class S>
void intersect_backward_cuda(const Rays<S>& rays, const Box<S>& box, const S* d_near, const S* d_far, S* d_origins,
                             S* d_directions, void* stream);

template <class S>
struct Crossing {
    S near, far;
    bool starts_outside;      // else near is the origin itself
    int near_axis, far_axis;  // the axes of the faces that are crossed
};

// Beyond this many box sides from the box, differences of coordinates in single precision are too coarse.
constexpr int kFarSides = 64;

template <class Wide, class S>
FACTORKIT_HOST_DEVICE Crossing<S> cross_box_as(const S* o, const S* d, const Box<S>& box) {
    Wide near = -Wide(INFINITY), far = Wide(INFINITY);
    int near_axis = -1, far_axis = -1;
    bool inside = true;
    for (int a = 0; a < 3; ++a) {
        if (d[a] == S(0)) {  // parallel to two faces: between them all the way, or never
            inside = inside && o[a] >= box.lower[a] && o[a] <= box.upper[a];
            continue;
        }
        const Wide first = (Wide(d[a] > S(0) ? box.lower[a] : box.upper[a]) - Wide(o[a])) / Wide(d[a]);
        const Wide second = (Wide(d[a] > S(0) ? box.upper[a] : box.lower[a]) - Wide(o[a])) / Wide(d[a]);
        if (first > near) near = first, near_axis = a;
        if (second < far) far = second, far_axis = a;
    }
    if (!(inside && far_axis >= 0 && near <= far && far >= Wide(0))) return {S(0), S(0), false, -1, -1};
    return {near > Wide(0) ? S(near) : S(0), S(far), near > Wide(0), near_axis, far_axis};
}

template <class S>
FACTORKIT_HOST_DEVICE Crossing<S> cross_box(const S* o, const S* d, const Box<S>& box) {
    for (int a = 0; sizeof(S) < sizeof(double) && a < 3; ++a) {
        const S reach = S(kFarSides) * (box.upper[a] - box.lower[a]);
        if (o[a] < box.lower[a] - reach || o[a] > box.upper[a] + reach) return cross_box_as<double>(o, d, box);
    }
    return cross_box_as<S>(o, d, box);
}

// The point o + t d stays on a face normal to an axis, so do + dt d + t dd = 0 along that axis.
template <class S>
FACTORKIT_HOST_DEVICE void add_crossing_gradient(const S* d, S t, int axis, S grad, S* d_o, S* d_d) {
    const S g = -grad / d[axis];
    d_o[axis] += g;
    d_d[axis] += t * g;
}

template <class S>
FACTORKIT_HOST_DEVICE void intersect_ray(const Rays<S>& rays, const Box<S>& box, S* near, S* far, std::int64_t i) {
    const Crossing<S> hit = cross_box(rays.origins + 3 * i, rays.directions + 3 * i, box);
    near[i] = hit.near;
    far[i] = hit.far;
}

template <class S>
FACTORKIT_HOST_DEVICE void intersect_ray_backward(const Rays<S>& rays, const Box<S>& box, const S* d_near,
                                                  const S* d_far, S* d_origins, S* d_directions, std::int64_t i) {
    const S *o = rays.origins + 3 * i, *d = rays.directions + 3 * i;
    S d_o[3] = {}, d_d[3] = {};
    const Crossing<S> hit = cross_box(o, d, box);
    if (hit.starts_outside) add_crossing_gradient(d, hit.near, hit.near_axis, d_near[i], d_o, d_d);
    if (hit.far_axis >= 0) add_crossing_gradient(d, hit.far, hit.far_axis, d_far[i], d_o, d_d);
    for (int a = 0; a < 3; ++a) {
        d_origins[3 * i + a] = d_o[a];
        d_directions[3 * i + a] = d_d[a];
    }
}

}  // namespace factorkit
