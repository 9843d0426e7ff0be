#include "scan/ssd_chunk_simd.h"
namespace tilewright::TW_ISA {
int64_t ssd_chunk_scan_bwd_workspace_cpu(const SsdChunkScanParams&, int) { return 0; }
void ssd_chunk_scan_bwd_cpu(const SsdChunkScanParams&, int) {}
}
