// A device "fakegpu" whose memory is the CPU's and whose operations run on the CPU, but which refuses what
// CUDA refuses: tensors of two devices in one operation, and generators of another device.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <set>
#include <string>

using namespace at;
using OptionalGenerator = std::optional<Generator>;

namespace fake {

static constexpr auto kFake = c10::DeviceType::PrivateUse1;
static const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// The device: one, with one stream on which everything is done at once.

struct FakeGuard final : public c10::impl::DeviceGuardImplInterface {
  static c10::Device only() { return c10::Device(kFake, 0); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, only()); }
  c10::DeviceType type() const override { return kFake; }
  c10::Device exchangeDevice(c10::Device) const override { return only(); }
  c10::Device getDevice() const override { return only(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, FakeGuard);

struct FakeAllocator final : public c10::Allocator {
  static void release(void* memory) { free(memory); }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = malloc(bytes ? bytes : 1);
    return {memory, memory, &release, FakeGuard::only()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};
static FakeAllocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

static void grow(c10::StorageImpl* storage, size_t bytes) {
  auto memory = allocator.allocate(bytes);
  memcpy(memory.get(), storage->data(), std::min(storage->nbytes(), bytes));
  storage->set_data_ptr_noswap(std::move(memory));
  storage->set_nbytes(bytes);
}

// Generators: a CPU generator with another label.

struct FakeGenerator final : public c10::GeneratorImpl {
  Generator inner;
  explicit FakeGenerator(c10::DeviceIndex index)
      : c10::GeneratorImpl(c10::Device(kFake, index), kKeys), inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  FakeGenerator* clone_impl() const override { return new FakeGenerator(0); }
};

struct FakeHooks final : public PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  bool isAvailable() const override { return true; }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = make_generator<FakeGenerator>(0);
    return generator;
  }
  Generator getNewGenerator(DeviceIndex index) const override {
    return make_generator<FakeGenerator>(index < 0 ? 0 : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    grow(storage.unsafeGetStorageImpl(), bytes);
  }
};
static const bool hooked = [] {
  RegisterPrivateUse1HooksInterface(new FakeHooks());
  return true;
}();

// Memory: tensors, copies and views.

static Tensor as_cpu(const Tensor& x) {  // the same memory
  return from_blob(x.data_ptr(), x.sizes(), x.strides(), TensorOptions().dtype(x.dtype()).device(kCPU));
}

static Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
                    std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

static Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype,
                            std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

static Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Tensor target = to.is_cpu() ? to : as_cpu(to);
  target.copy_(from.is_cpu() ? from : as_cpu(from));
  return to;
}

static Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

static Scalar local_scalar(const Tensor& x) { return at::_local_scalar_dense(as_cpu(x)); }

static Tensor view(const Tensor& x, c10::SymIntArrayRef size) {
  return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size));
}

static Tensor as_strided(const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset.has_value()) start = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           start);
}

static Tensor reshape_alias(const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

static const Tensor& resize(const Tensor& x, c10::SymIntArrayRef asked, std::optional<MemoryFormat>) {
  auto size = C10_AS_INTARRAYREF_SLOW(asked);
  auto* tensor = x.unsafeGetTensorImpl();
  if (tensor->sizes() == size) return x;
  int64_t count = 1;
  for (auto n : size) count *= n;
  size_t bytes = (count + tensor->storage_offset()) * x.dtype().itemsize();
  if (tensor->storage().nbytes() < bytes) grow(tensor->unsafe_storage().unsafeGetStorageImpl(), bytes);
  tensor->set_sizes_contiguous(size);
  return x;
}

static Tensor& set_storage(Tensor& x, Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                           c10::SymIntArrayRef stride) {
  auto* tensor = x.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  tensor->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return x;
}

// Random numbers. A CPU's tensor refuses this device's generators by itself; this device's refuse others.

static OptionalGenerator own(const OptionalGenerator& generator) {
  if (!generator.has_value() || !generator->defined()) return std::nullopt;
  TORCH_CHECK(generator->device().type() == kFake,
              "Expected a 'fakegpu' device type for generator but found '", generator->device(), "'");
  return static_cast<FakeGenerator*>(generator->unsafeGetGeneratorImpl())->inner;
}

static Tensor on_device(const Tensor& x) {
  TORCH_CHECK(x.device().type() == kFake, "Expected a '", x.device().type(),
              "' device type for generator but found 'fakegpu'");
  return as_cpu(x);
}

static Tensor& normal(Tensor& x, double mean, double std, OptionalGenerator g) {
  on_device(x).normal_(mean, std, own(g));
  return x;
}

static Tensor& uniform(Tensor& x, double low, double high, OptionalGenerator g) {
  on_device(x).uniform_(low, high, own(g));
  return x;
}

static Tensor& random(Tensor& x, OptionalGenerator g) {
  on_device(x).random_(own(g));
  return x;
}

static Tensor& random_from(Tensor& x, int64_t low, std::optional<int64_t> high, OptionalGenerator g) {
  on_device(x).random_(low, high, own(g));
  return x;
}

static Tensor& random_to(Tensor& x, int64_t high, OptionalGenerator g) {
  on_device(x).random_(high, own(g));
  return x;
}

static Tensor& bernoulli(Tensor& x, double p, OptionalGenerator g) {
  on_device(x).bernoulli_(p, own(g));
  return x;
}

static Tensor& bernoulli_each(Tensor& x, const Tensor& p, OptionalGenerator g) {
  on_device(x).bernoulli_(on_device(p), own(g));
  return x;
}

static Tensor& exponential(Tensor& x, double rate, OptionalGenerator g) {
  on_device(x).exponential_(rate, own(g));
  return x;
}

static Tensor multinomial(const Tensor& p, int64_t n, bool replacement, OptionalGenerator g) {
  return at::multinomial(on_device(p.contiguous()), n, replacement, own(g)).to(p.device());
}

static Tensor& randperm(int64_t n, OptionalGenerator g, Tensor& out) {
  on_device(out);
  auto order = at::randperm(n, own(g), TensorOptions().dtype(out.dtype()));
  out.resize_({n});
  out.copy_(order);
  return out;
}

// All other operations.

struct Found {
  bool fake = false;
  std::string cpu;  // the argument that holds a CPU tensor
  void look(const Tensor& x, const std::string& argument) {
    if (!x.defined()) return;
    if (x.device().type() == kFake) fake = true;
    else if (x.is_cpu() && x.dim()) cpu = argument;  // a number may come from the CPU
  }
};

static void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> copies = {"aten::copy_", "aten::_to_copy", "aten::to"};
  static const std::set<std::string> indexing = {"aten::index", "aten::index_put", "aten::index_put_",
                                                 "aten::_index_put_impl_"};
  const auto& name = op.schema().operator_name().name;
  const auto& arguments = op.schema().arguments();
  auto values = torch::jit::last(stack, arguments.size());
  bool indexes = indexing.count(name) && values[0].toTensor().device().type() == kFake;
  Found found;
  for (size_t i = 0; i < arguments.size(); i++) {
    if (indexes && arguments[i].name() == "indices") continue;  // these may come from the CPU
    if (values[i].isTensor()) found.look(values[i].toTensor(), arguments[i].name());
    if (values[i].isTensorList())
      for (const auto& x : values[i].toTensorVector()) found.look(x, arguments[i].name());
    if (values[i].isOptionalTensorList())
      for (const auto& x : values[i].toOptionalTensorVector())
        if (x.has_value()) found.look(*x, arguments[i].name());
  }
  TORCH_CHECK(!found.fake || found.cpu.empty() || copies.count(name),
              "Expected all tensors to be on the same device, but found at least two devices, ",
              "fakegpu:0 and cpu! (argument '", found.cpu, "' of ", name, ")");
  at::native::cpu_fallback(op, stack);
}

}  // namespace fake

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fake::on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &fake::empty);
  m.impl("empty_strided", &fake::empty_strided);
  m.impl("_copy_from", &fake::copy_from);
  m.impl("_copy_from_and_resize", &fake::copy_from_and_resize);
  m.impl("_local_scalar_dense", &fake::local_scalar);
  m.impl("view", &fake::view);
  m.impl("as_strided", &fake::as_strided);
  m.impl("_reshape_alias", &fake::reshape_alias);
  m.impl("resize_", &fake::resize);
  m.impl("set_.source_Storage_storage_offset", &fake::set_storage);
  m.impl("normal_", &fake::normal);
  m.impl("uniform_", &fake::uniform);
  m.impl("random_", &fake::random);
  m.impl("random_.from", &fake::random_from);
  m.impl("random_.to", &fake::random_to);
  m.impl("bernoulli_.float", &fake::bernoulli);
  m.impl("bernoulli_.Tensor", &fake::bernoulli_each);
  m.impl("exponential_", &fake::exponential);
  m.impl("multinomial", &fake::multinomial);
  m.impl("randperm.generator_out", &fake::randperm);
}
