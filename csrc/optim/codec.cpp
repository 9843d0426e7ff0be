#include "optim/codec_table.h"

namespace tilewright::optim {

constexpr Codebook kSignedTable = make_codebook<true>();
constexpr Codebook kUnsignedTable = make_codebook<false>();
const Codebook kSignedCodebook = kSignedTable;
const Codebook kUnsignedCodebook = kUnsignedTable;

}  // namespace tilewright::optim
