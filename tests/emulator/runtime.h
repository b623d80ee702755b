// The limits of the emulated device.
#pragma once

#include "emulator.h"

namespace emulator {

// what the device would say to this launch; cluster: the blocks of one cluster
cudaError_t check_launch(const cudaLaunchConfig_t& config, const Launch& launch, dim3* cluster);

// the error, kept for cudaGetLastError
cudaError_t remember(cudaError_t error);

}  // namespace emulator
