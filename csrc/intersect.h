// Where rays o + t d, t >= 0, enter and leave a box or a sphere. A miss is the empty interval near = far = 0.
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

enum class ShapeKind { box, sphere };

template <class S>
struct Shape {
    ShapeKind kind;
    S a[3];  // a box's lower corner, a sphere's centre
    S b[3];  // a box's upper corner; b[0] is a sphere's radius
};

template <class S>
void intersect(const Rays<S>& rays, const Shape<S>& shape, S* near, S* far, int threads);  // near, far: [count]

// Gradients [count, 3] for origins and directions from those for near and far.
template <class S>
void intersect_backward(const Rays<S>& rays, const Shape<S>& shape, const S* d_near, const S* d_far, S* d_origins,
                        S* d_directions, int threads);

// The same on the current CUDA device. Throws std::runtime_error if a launch fails. In builds with CUDA only.
template <class S>
void intersect_cuda(const Rays<S>& rays, const Shape<S>& shape, S* near, S* far, void* stream);
template <class S>
void intersect_backward_cuda(const Rays<S>& rays, const Shape<S>& shape, const S* d_near, const S* d_far, S* d_origins,
                             S* d_directions, void* stream);

template <class S>
struct Crossing {
    S near, far;
    bool starts_outside;         // else near is the origin itself
    int near_axis, far_axis;     // of the faces of a box
};

template <class S>
FACTORKIT_HOST_DEVICE Crossing<S> cross_box(const S* o, const S* d, const S* lower, const S* upper) {
    S near = -S(INFINITY), far = S(INFINITY);
    int near_axis = -1, far_axis = -1;
    bool inside = true;
    for (int a = 0; a < 3; ++a) {
        if (d[a] == S(0)) {  // parallel to two faces: between them all the way, or never
            inside = inside && o[a] >= lower[a] && o[a] <= upper[a];
            continue;
        }
        const S first = ((d[a] > S(0) ? lower[a] : upper[a]) - o[a]) / d[a];
        const S second = ((d[a] > S(0) ? upper[a] : lower[a]) - o[a]) / d[a];
        if (first > near) near = first, near_axis = a;
        if (second < far) far = second, far_axis = a;
    }
    if (!(inside && far_axis >= 0 && near <= far && far >= S(0))) return {S(0), S(0), false, -1, -1};
    return {near > S(0) ? near : S(0), far, near > S(0), near_axis, far_axis};
}

// From the point nearest the centre outwards, which loses no digits to a far origin; the root that would come of a
// difference is taken from the product of the two.
template <class S>
FACTORKIT_HOST_DEVICE Crossing<S> cross_sphere(const S* o, const S* d, const S* centre, S radius) {
    S square = 0, along = 0, distance = 0;
    for (int a = 0; a < 3; ++a) {
        const S x = o[a] - centre[a];
        square += d[a] * d[a];
        along -= x * d[a];
        distance += x * x;
    }
    const S middle = along / square;
    S gap = 0;
    for (int a = 0; a < 3; ++a) {
        const S x = o[a] - centre[a] + middle * d[a];
        gap += x * x;
    }
    const S half = std::sqrt((radius * radius - gap) / square);
    if (!(square > S(0) && half >= S(0))) return {S(0), S(0), false, -1, -1};
    const S root = std::sqrt(distance), product = (root - radius) * (root + radius) / square;
    const S far = middle > S(0) ? middle + half : product / (middle - half);
    const S near = middle > S(0) ? product / far : middle - half;
    if (!(far >= S(0))) return {S(0), S(0), false, -1, -1};
    const bool outside = near > S(0);
    return {outside ? (near < far ? near : far) : S(0), far, outside, 0, 0};
}

template <class S>
FACTORKIT_HOST_DEVICE Crossing<S> cross(const Shape<S>& shape, const S* o, const S* d) {
    return shape.kind == ShapeKind::box ? cross_box(o, d, shape.a, shape.b) : cross_sphere(o, d, shape.a, shape.b[0]);
}

// The point o + t d stays on a surface with normal n, so n . (do + dt d + t dd) = 0.
template <class S>
FACTORKIT_HOST_DEVICE void add_crossing_gradient(const Shape<S>& shape, const S* o, const S* d, S t, int axis, S grad,
                                                 S* d_o, S* d_d) {
    S normal[3], slope = 0;
    for (int a = 0; a < 3; ++a) {
        normal[a] = shape.kind == ShapeKind::box ? S(a == axis) : o[a] - shape.a[a] + t * d[a];
        slope += normal[a] * d[a];
    }
    if (slope == S(0)) return;  // a ray that only touches the sphere
    for (int a = 0; a < 3; ++a) {
        const S g = -grad * normal[a] / slope;
        d_o[a] += g;
        d_d[a] += t * g;
    }
}

template <class S>
FACTORKIT_HOST_DEVICE void intersect_ray(const Rays<S>& rays, const Shape<S>& shape, S* near, S* far, std::int64_t i) {
    const Crossing<S> hit = cross(shape, rays.origins + 3 * i, rays.directions + 3 * i);
    near[i] = hit.near;
    far[i] = hit.far;
}

template <class S>
FACTORKIT_HOST_DEVICE void intersect_ray_backward(const Rays<S>& rays, const Shape<S>& shape, const S* d_near,
                                                  const S* d_far, S* d_origins, S* d_directions, std::int64_t i) {
    const S *o = rays.origins + 3 * i, *d = rays.directions + 3 * i;
    S d_o[3] = {}, d_d[3] = {};
    const Crossing<S> hit = cross(shape, o, d);
    if (hit.starts_outside) add_crossing_gradient(shape, o, d, hit.near, hit.near_axis, d_near[i], d_o, d_d);
    if (hit.far_axis >= 0) add_crossing_gradient(shape, o, d, hit.far, hit.far_axis, d_far[i], d_o, d_d);
    for (int a = 0; a < 3; ++a) {
        d_origins[3 * i + a] = d_o[a];
        d_directions[3 * i + a] = d_d[a];
    }
}

}  // namespace factorkit
