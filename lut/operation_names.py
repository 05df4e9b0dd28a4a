"""The names of the aten operations that a network may run beside its layers. What is not listed is refused."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Without the "_" of those that write in place.
MOVES = _words(  # every value of the output is a value of an input, or zero
    "as_strided squeeze unsqueeze transpose t detach _unsafe_view _reshape_alias clone copy _to_copy contiguous cat "
    "stack repeat repeat_interleave roll flip rot90 index index_select index_put "
    "gather scatter select_scatter slice_scatter embedding constant_pad_nd reflection_pad1d reflection_pad2d "
    "replication_pad1d replication_pad2d pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle "
    "upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d im2col max_pool2d max_pool2d_with_indices "
    "adaptive_max_pool2d sort topk tril triu fill zero zeros_like ones_like full_like empty_like rand_like randn_like "
    "new_zeros new_ones new_full new_empty empty_strided new_empty_strided unfold_copy view_copy expand_copy resize "
    "lift_fresh lift_fresh_copy native_dropout dropout bernoulli uniform normal is_same_size sym_size"
)
POINTWISE = _words(  # beside those that torch tags so
    "hardswish hardtanh prelu _prelu_kernel glu log_sigmoid log_sigmoid_forward mish rsub floor_divide masked_fill "
    "threshold rrelu_with_noise rrelu_with_noise_functional native_batch_norm _native_batch_norm_legit_no_training "
    "_batch_norm_no_update cudnn_batch_norm miopen_batch_norm fake_quantize_per_tensor_affine "
    "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams"
)
REDUCTIONS = _words(  # sums, means and extremes of single tensors, and what is made of them
    "sum nansum mean nanmean amax amin aminmax max min argmax argmin any all var var_mean std std_mean norm median "
    "linalg_vector_norm logsumexp cumsum cumprod cummax logcumsumexp prod count_nonzero _softmax _log_softmax softmax "
    "log_softmax avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d "
    "upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa col2im "
    "grid_sampler_2d native_layer_norm native_group_norm _native_batch_norm_legit _fused_rms_norm "
    "scatter_add scatter_reduce index_add"
)
ADDITIVE = _words(  # pointwise, without a product
    "add sub rsub where masked_fill maximum minimum clamp clamp_min clamp_max eq ne lt le gt ge neg relu"
)
SUMS = _words("add sub rsub")  # pointwise, of whole tensors
SUMS_OF_PRODUCTS = _words("addcmul addcdiv lerp")
READS_VALUES = _words(  # what follows depends on the values of a tensor
    "_local_scalar_dense equal nonzero masked_select _unique2 unique_dim unique_consecutive bincount"
)
