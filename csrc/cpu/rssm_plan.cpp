#include "cpu/rssm_plan.h"

#include <omp.h>

namespace fastrssm::cpu {

ScanLayout::ScanLayout(const std::vector<Size>& values)
    : T(values.at(0)),
      B(values.at(1)),
      D(values.at(2)),
      S(values.at(3)),
      A(values.at(4)),
      groups(values.at(5)),
      cell(static_cast<Cell>(values.at(6))),
      heads(static_cast<Heads>(values.at(7))),
      latent(static_cast<Latent>(values.at(8))),
      pre_width(values.at(9)),
      head_layers(values.at(10)),
      head_width(values.at(11)),
      policy_layers(values.at(12)),
      policy_width(values.at(13)),
      observe(values.at(14) != 0),
      detach(values.at(15) != 0),
      blocks(values.at(16)),
      branch(values.at(17)) {}

LayerPlaces::LayerPlaces(const ScanLayout& layout) {
  Size next = 0;
  pre = layout.pre_width ? next++ : -1;
  cell_input = next++;
  cell_state = layout.cell == Cell::kTorchGru ? next++ : -1;
  head = next;
  branches = head + layout.head_layers;
  policy = branches + (layout.in_blocks() ? ScanLayout::kBranches + 1 : 0);
  count = policy + layout.policy_layers;
}

namespace {

// rows [row, row + rows) and columns [column, column + columns) of a layer's weight
Product part_of(Size layer, Size row, Size rows, Size column, Size columns, Size ld,
                bool transposed) {
  if (transposed) return {layer, row, column, ld, columns, rows};
  return {layer, row, column, ld, rows, columns};
}

// adds the products of a network, of its weights or of their transposes
Net add_net(std::vector<Product>& products, bool transposed, bool split, Size layers, Size in,
            Size width, Size out, Size layer) {
  const Net net{split, layers, in, width, out, layer, static_cast<Size>(products.size())};
  const auto add = [&](Size l, Size row, Size rows, Size columns) {
    products.push_back(part_of(layer + l, row, rows, 0, columns, columns, transposed));
  };
  for (Size l = 0; l < layers; ++l) {
    const Size rows = l + 1 == layers ? out : width, columns = l == 0 ? in : width;
    if (!split) {
      add(l, 0, rows, columns);
    } else if (l == 0) {
      add(l, 0, 2 * rows, columns);
    } else {
      add(l, 0, rows, columns);
      add(l, rows, rows, columns);
    }
  }
  return net;
}

}  // namespace

Plan::Plan(const ScanLayout& layout) {
  const LayerPlaces places(layout);
  const Size D = layout.D, x = layout.cell_in();
  const bool torch_gru = layout.cell == Cell::kTorchGru;
  const auto add = [](std::vector<Product>& list, Product product) {
    list.push_back(product);
    return static_cast<Size>(list.size()) - 1;
  };
  const auto whole = [&](std::vector<Product>& list, Size layer, Size rows, Size columns) {
    return add(list, part_of(layer, 0, rows, 0, columns, columns, &list == &transposed));
  };
  pre = pre_back = cell_state_rz = cell_state_n = cell_state_back = -1;
  branches = mix_own = mix_shared = -1;
  if (layout.pre_width) {
    pre = whole(forward, places.pre, layout.pre_width, layout.action_in());
    pre_back = whole(transposed, places.pre, layout.pre_width, layout.action_in());
  }
  if (layout.in_blocks()) {
    for (auto* list : {&forward, &transposed}) {
      const bool back = list == &transposed;
      const Size own = layout.own(), mix = places.branches + ScanLayout::kBranches;
      branches = static_cast<Size>(list->size());
      for (Size i = 0; i < ScanLayout::kBranches; ++i) {
        whole(*list, places.branches + i, layout.branch, layout.branch_in(i));
      }
      const Size ld = layout.mix_in();
      mix_shared = add(*list, part_of(mix, 0, D, own, ld - own, ld, back));
      mix_own = mix_shared + 1;
      for (Size g = 0; g < layout.blocks; ++g) {
        add(*list, part_of(mix, g * own, own, 0, own, ld, back));
      }
      cell_input = cell_back = mix_own + layout.blocks;
      for (Size g = 0; g < layout.blocks; ++g) {
        add(*list, part_of(places.cell_input, 3 * g * own, 3 * own, 0, own, own, back));
      }
    }
  } else {
    const Size in = torch_gru ? x : x + D;
    cell_input = whole(forward, places.cell_input, 3 * D, in);
    cell_back = whole(transposed, places.cell_input, 3 * D, in);
  }
  if (torch_gru) {
    cell_state_rz = add(forward, part_of(places.cell_state, 0, 2 * D, 0, D, D, false));
    cell_state_n = add(forward, part_of(places.cell_state, 2 * D, D, 0, D, D, false));
    cell_state_back = whole(transposed, places.cell_state, 3 * D, D);
  }
  const Size out = layout.split() ? layout.S : layout.stats();
  head = add_net(forward, false, layout.split(), layout.head_layers, D, layout.head_width, out,
                 places.head);
  head_back = add_net(transposed, true, layout.split(), layout.head_layers, D, layout.head_width,
                      out, places.head);
  policy = add_net(forward, false, true, layout.policy_layers, D + layout.S, layout.policy_width,
                   layout.A, places.policy);
  policy_back = add_net(transposed, true, true, layout.policy_layers, D + layout.S,
                        layout.policy_width, layout.A, places.policy);
  widest = 4 * D;
  for (const auto* list : {&forward, &transposed}) {
    for (const Product& p : *list) widest = std::max({widest, p.N, p.K});
  }
  widest = std::max(
      {widest, x, layout.action_in(), 2 * layout.S, 2 * layout.A, head.hidden(), policy.hidden()});
}

template <typename T>
template <typename Visit>
void KeptArrays<T>::visit(const ScanLayout& layout, Visit visit) {
  visit(action_in, layout.action_in());
  visit(deter_in, layout.D);
  if (layout.pre_width) {
    visit(pre_hat, layout.pre_width);
    visit(pre_rstd, 1);
    visit(pre, layout.pre_width);
  }
  visit(gates, 4 * layout.D);
  if (layout.ln_gru()) {
    visit(cell_hat, 3 * layout.D);
    visit(cell_rstd, 1);
  }
  if (layout.in_blocks()) {
    branch_hat.resize(ScanLayout::kBranches);
    branch_rstd.resize(ScanLayout::kBranches);
    for (Kept<T>& array : branch_hat) visit(array, layout.branch);
    for (Kept<T>& array : branch_rstd) visit(array, 1);
    visit(branch, ScanLayout::kBranches * layout.branch);
    visit(mix_hat, layout.D);
    visit(mix_rstd, 1);
    visit(mix, layout.D);
  }
  const Size hidden = layout.head_layers - 1;
  head.resize(hidden);
  head_hat.resize(layout.split() ? 0 : hidden);
  head_rstd.resize(layout.split() ? 0 : hidden);
  for (Kept<T>& array : head) visit(array, layout.head_hidden());
  for (Kept<T>& array : head_hat) visit(array, layout.head_width);
  for (Kept<T>& array : head_rstd) visit(array, 1);
  if (layout.gaussian()) visit(raw, layout.S);
  if (layout.policy_layers) {
    policy.resize(layout.policy_layers - 1);
    for (Kept<T>& array : policy) visit(array, 2 * layout.policy_width);
    visit(action_raw, layout.A);
  }
}

template <typename T>
KeptArrays<T>::KeptArrays(const ScanLayout& layout, T* buffer, bool all_times) {
  const Size rows = all_times ? layout.rows() : layout.B;
  visit(layout, [&](Kept<T>& array, Size width) {
    array = {buffer, width, all_times ? layout.B : 0};
    buffer += rows * width;
  });
}

template <typename T>
Size KeptArrays<T>::width(const ScanLayout& layout) {
  Size sum = 0;
  KeptArrays<T> none;
  none.visit(layout, [&](Kept<T>&, Size width) { sum += width; });
  return sum;
}

Size scan_saved_numel(const ScanLayout& layout) {
  return layout.rows() * KeptArrays<float>::width(layout);
}

template <typename T>
Size scan_packed_bytes(const Gemm<T>& gemm, const ScanLayout& layout, bool transposed) {
  const Plan plan(layout);
  Size bytes = 0;
  for (const Product& p : transposed ? plan.transposed : plan.forward) {
    bytes += PackedWeights<T>::aligned(weight_bytes(gemm, p.N, p.K));
  }
  return bytes;
}

template <typename T>
void scan_pack(const Gemm<T>& gemm, const ScanLayout& layout,
               const std::vector<LayerOf<const T>>& weights, bool transposed, char* packed,
               int threads) {
  const Plan plan(layout);
  const std::vector<Product>& products = transposed ? plan.transposed : plan.forward;
  std::vector<char*> places;
  for (const Product& p : products) {
    places.push_back(packed);
    packed += PackedWeights<T>::aligned(weight_bytes(gemm, p.N, p.K));
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::size_t i = 0; i < products.size(); ++i) {
    const Product& p = products[i];
    const T* w = weights[p.layer].weight + p.row * p.ld + p.column;
    pack_weights(gemm, w, transposed ? 1 : p.ld, transposed ? p.ld : 1, p.N, p.K, places[i]);
  }
}

#define FASTRSSM_INSTANTIATE(T)                                                \
  template struct KeptArrays<T>;                                               \
  template Size scan_packed_bytes<T>(const Gemm<T>&, const ScanLayout&, bool); \
  template void scan_pack<T>(const Gemm<T>&, const ScanLayout&,                \
                             const std::vector<LayerOf<const T>>&, bool, char*, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)

}  // namespace fastrssm::cpu
