// Lets fake tensors use the device type "cuda" where torch was built without CUDA. Nothing ever runs on it.
//
// Torch asks a device's guard for the current device and stream, and its hooks whether the device exists. These answer
// that there is one GPU, number 0, and that all its work is done.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto kind = c10::DeviceType::CUDA;

struct OneGpuGuard final : public c10::impl::NoOpDeviceGuardImpl<kind> {
  c10::Device only() const { return c10::Device(kind, 0); }
  c10::Device getDevice() const override { return only(); }
  c10::Device exchangeDevice(c10::Device) const override { return only(); }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, only()); }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream(only()); }
  c10::Stream getNewStream(c10::Device, int) const override { return getStream(only()); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(only()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct CUDAHooks final : public at::CUDAHooksInterface {  // the registry finds it by this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, OneGpuGuard);
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}
