// Block-sparse attention forward on Hopper. Beside block_sparse_fwd_cuda, which runs on any GPU.
#pragma once

#include "attention/block_sparse.h"

namespace tilewright::attention {

// Whether the device is Hopper and the build has code for it (sm_90a).
bool block_sparse_sm90_available(int device);

// Whether the kernel takes these: 16-bit tensors with rows that the copy engine can address (inner stride 1,
// all addresses and strides multiples of 16 bytes), block_q a multiple of 64, head dims multiples of 8 up to
// 128, nothing empty.
bool block_sparse_fwd_sm90_fits(const BlockSparseParams&);

// Bytes of workspace, 64-byte aligned.
int64_t block_sparse_fwd_workspace_sm90(const BlockSparseParams&);

void block_sparse_fwd_sm90(const BlockSparseParams&, int device, Stream);

}  // namespace tilewright::attention
