// A call of banded attention, from tensors: window_attention, and mla_attention, whose window is unbounded.
#pragma once

#include "attention/window_cpu.h"

#ifdef TILEFUSE_REGISTER

namespace tilefuse {

namespace baseline {
void window_attention_pass(const WindowAttentionCall& call, Pass pass, int64_t begin, int64_t end);
}
TILEFUSE_DISPATCH(window_attention_pass)

// tasks of a bias's gradient at least, where there are as many tiles
constexpr int64_t kBiasTasks = 64;

// packed tokens that belong to no sequence keep these values
inline Tensor new_rows(const Tensor& like, const std::vector<int64_t>& shape) {
  return like.dim() == 3 ? torch::stable::new_zeros(like, shape) : empty_of(like, shape);
}

inline Tensor new_statistics(const Tensor& q, float value) {
  Tensor t = empty_of(q, statistics_shape(q), ScalarType::Float);
  if (q.dim() == 3) torch::stable::fill_(t, value);
  return t;
}

inline std::tuple<Tensor, Tensor> window_attention_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor sinks,
                                                       OptionalTensor alibi_slopes, OptionalTensor cu_seqlens_q,
                                                       OptionalTensor cu_seqlens_k, OptionalTensor distance_bias,
                                                       int64_t left, int64_t right, int64_t dilation, double scale,
                                                       double softcap, int64_t sink_tokens) {
  WindowAttentionSetup setup(q, k, v, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, distance_bias, left, right,
                             dilation, scale, softcap, sink_tokens);
  Tensor out = new_rows(q, with_last(q, v.size(v.dim() - 1)));
  Tensor lse = new_statistics(q, -baseline::kInfinity);
  WindowAttentionCall& call = setup.call;
  call.out = rows_of(out);
  call.lse = statistics_of(lse);
  run_parallel(window_attention_pass, call.heads * call.query_tiles, 1, call, Pass::forward);
  return {out, lse};
}

// -sum exp(sink - lse) * delta
inline void sink_gradient(const WindowAttentionCall& call, const Tensor& lse, const Tensor& delta, Tensor& dsinks) {
  std::vector<float> sums(call.heads);
  const Statistics of_lse = statistics_of(lse), of_delta = statistics_of(delta);
  const int64_t batch = lse.dim() == 3 ? lse.size(0) : 1, tokens = lse.size(lse.dim() - 1);
  parallel_for(0, call.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t t = 0; t < tokens; ++t) {
          const float row_lse = *baseline::at(of_lse, b, h, t);
          if (row_lse != -baseline::kInfinity)
            sum += std::exp(static_cast<double>(call.sinks[h]) - row_lse) * *baseline::at(of_delta, b, h, t);
        }
      }
      sums[h] = static_cast<float>(-sum);
    }
  });
  write_floats(dsinks, sums);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_bwd(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor sinks,
    OptionalTensor alibi_slopes, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor distance_bias,
    int64_t left, int64_t right, int64_t dilation, double scale, double softcap, int64_t sink_tokens) {
  WindowAttentionSetup setup(q, k, v, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, distance_bias, left, right,
                             dilation, scale, softcap, sink_tokens);
  Tensor dq = new_rows(q, shape_of(q)), dk = new_rows(k, shape_of(k)), dv = new_rows(v, shape_of(v));
  Tensor delta = new_statistics(q, 0.0f);
  WindowAttentionCall& call = setup.call;
  call.out = rows_of(out);
  call.dout = rows_of(dout);
  call.dq = rows_of(dq);
  call.dk = rows_of(dk);
  call.dv = rows_of(dv);
  call.lse = statistics_of(lse);
  call.delta = statistics_of(delta);
  if (dlse) call.dlse = statistics_of(*dlse);
  run_parallel(window_attention_pass, call.heads * call.query_tiles, 1, call, Pass::query_gradient);
  run_parallel(window_attention_pass, call.kv_heads * call.key_tiles, 1, call, Pass::key_gradient);
  if (call.prefix > 0)
    run_parallel(window_attention_pass, call.sequence_count * call.kv_heads * ((call.prefix + 63) / 64), 1, call,
                 Pass::prefix_gradient);
  if (!sinks) return {dq, dk, dv, empty_of(q, {0})};
  Tensor dsinks = empty_of(*sinks, {call.heads});
  sink_gradient(call, lse, delta, dsinks);
  return {dq, dk, dv, dsinks};
}

inline Tensor window_attention_bwd_bias(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                                        Tensor lse, OptionalTensor sinks, OptionalTensor alibi_slopes,
                                        OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                        OptionalTensor distance_bias, int64_t left, int64_t right, int64_t dilation,
                                        double scale, double softcap, int64_t sink_tokens) {
  WindowAttentionSetup setup(q, k, v, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, distance_bias, left, right,
                             dilation, scale, softcap, sink_tokens);
  WindowAttentionCall& call = setup.call;
  call.out = rows_of(out);
  call.dout = rows_of(dout);
  call.lse = statistics_of(lse);
  if (dlse) call.dlse = statistics_of(*dlse);
  // parts depend on sizes alone, so that the order of their sum does
  const int64_t wanted = call.heads > 0 ? (kBiasTasks + call.heads - 1) / call.heads : 1;
  call.bias_tiles = call.query_tiles > wanted ? (call.query_tiles + wanted - 1) / wanted : 1;
  call.bias_parts = (call.query_tiles + call.bias_tiles - 1) / call.bias_tiles;
  const int64_t values = call.heads * distance_bias->size(1);
  std::vector<float> parts(call.bias_parts * values);
  call.dbias = parts.data();
  run_parallel(window_attention_pass, call.heads * call.bias_parts, 1, call, Pass::bias_gradient);
  Tensor dbias = empty_of(*distance_bias, shape_of(*distance_bias));
  const auto add = [&](auto* to) {
    for (int64_t i = 0; i < values; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < call.bias_parts; ++part) sum += parts[part * values + i];
      to[i] = static_cast<std::decay_t<decltype(*to)>>(sum);
    }
  };
  if (dbias.scalar_type() == ScalarType::Double) {
    add(static_cast<double*>(dbias.mutable_data_ptr()));
  } else {
    add(static_cast<float*>(dbias.mutable_data_ptr()));
  }
  return dbias;
}

}  // namespace tilefuse

#endif  // TILEFUSE_REGISTER
