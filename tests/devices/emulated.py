"""A second device with real values on a machine that has only a CPU, to find what an accelerator would refuse.

`install()` gives PyTorch's reserved out-of-tree device the name `emu`. A tensor there carries a CPU tensor; every
operation is done on that, and refused where CUDA refuses it: an operand that is on the CPU, a generator of the CPU,
`numpy()`. It holds for the whole process and cannot be taken back, so that it gets a process of its own. Its rules are
CUDA's as they are documented; whether a real device agrees only a real device can say (`pytest -m gpu`).
"""

import weakref
from typing import ClassVar

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "emu"
CPU_GENERATOR = torch.Generator
aten = torch.ops.aten


class WrongDeviceError(RuntimeError):
    """What CUDA would refuse."""


class Counter:
    """How many operations have run on the device: a flow that ran none has not been there."""

    operations = 0


class Emulated(torch.Tensor):
    """A tensor that says it is on `emu:0`; its values are in `held`, on the CPU."""

    # PyTorch's own shortcut past `__torch_function__`; what happens is decided in `__torch_dispatch__`.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real, requires_grad=False):
        # Parameters are made anew by their type, as accelerate does when it brings one to the device.
        real = real.held if isinstance(real, Emulated) else real
        if real.is_meta:
            return torch.nn.Parameter(real, requires_grad)
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            layout=real.layout, device=torch.device(NAME, 0), requires_grad=requires_grad, storage_size=1 << 60,
        )  # fmt: skip
        made.held = real
        return made

    def __init__(self, held, requires_grad=False):
        del held, requires_grad

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        del types
        return dispatch(func, args, kwargs or {})

    # `Module.to` exchanges the contents of parameters that can be taken apart.
    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        del context, size, stride
        return Emulated(inner["held"])

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not isinstance(value, Emulated):
            raise WrongDeviceError(f".data of a tensor on {NAME} is given a tensor on {value.device}")
        self.held = value.held
        follow(self)

    # What C++ reads from memory, past every dispatcher.
    def tolist(self):
        return self.detach().held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def numpy(self, *, force=False):
        if force:
            return self.detach().held.numpy()
        raise TypeError(
            f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy it first."
        )

    def __array__(self, dtype=None, copy=None):
        del dtype, copy
        return self.numpy()

    def __format__(self, how):
        return format(self.item(), how) if self.dim() == 0 else object.__format__(self, how)

    def __repr__(self, *, tensor_contents=None):
        del tensor_contents
        return f"Emulated({self.detach().held!r})"

    def __reduce_ex__(self, protocol):
        raise TypeError(f"a tensor on {NAME} is not pickled")


def follow(owner):
    """Give a tensor the shape that an operation in place has given to its values."""
    real = owner.held
    if (owner.shape, owner.stride(), owner.storage_offset()) != (
        real.shape, real.stride(), real.storage_offset()
    ):  # fmt: skip
        with torch._C._DisableTorchDispatch():
            aten.as_strided_.default._op_dk(
                torch._C.DispatchKey.CompositeExplicitAutogradNonFunctional, owner, real.shape, real.stride(),
                real.storage_offset(),
            )  # fmt: skip
    return owner


class Rules:
    """Which operands on the CPU an operation of the device takes."""

    copies: ClassVar = {"copy_", "_copy_from", "_copy_from_and_resize", "_to_copy"}
    """Cross from one device to another."""
    indexed: ClassVar = {
        "index",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "_unsafe_index",
        "_unsafe_index_put",
    }
    """Copy indices by themselves."""
    scalars: ClassVar = {
        "where", "fill_", "fill", "masked_fill", "masked_fill_", "index_fill", "index_fill_", "index_put_", "index_put",
        "_index_put_impl_",
    }  # fmt: skip
    """Take numbers as tensors without dimensions; a pointwise operation takes one."""


def check(func, args, kwargs):
    """Raise where an operand is on the CPU and CUDA would not take it."""
    name = func._schema.name.removeprefix("aten::")
    if name in Rules.copies:
        return
    declared = func._schema.arguments
    given = [
        *zip(declared, args, strict=False),
        *((each, kwargs[each.name]) for each in declared if each.name in kwargs),
    ]
    parts = [
        (argument, part)
        for argument, value in given
        for part in (value if isinstance(value, list | tuple) else [value])
        if isinstance(part, torch.Tensor)
    ]
    if not any(isinstance(part, Emulated) for _, part in parts):
        return
    spare = 1 if torch.Tag.pointwise in func.tags else 0
    for argument, part in parts:
        if isinstance(part, Emulated) or (argument.name == "indices" and name in Rules.indexed):
            continue
        written = argument.alias_info is not None and argument.alias_info.is_write
        if part.dim() == 0 and not written and (name in Rules.scalars or spare):
            spare -= name not in Rules.scalars
            continue
        told = ", ".join(f"{each.name} on {tensor.device}" for each, tensor in parts)
        raise WrongDeviceError(f"Expected all tensors to be on the same device, but {name} found {told}")


def dispatch(func, args, kwargs):
    """Do an operation on the values, and put its result where the operation would have."""
    Counter.operations += 1
    name = func._schema.name
    if name == "aten::_has_compatible_shallow_copy_type":
        return False  # asked by `Module.to`, which then exchanges contents
    flat, spec = tree_flatten((args, kwargs))
    if any(isinstance(value, torch.Tensor) and not isinstance(value, Emulated) for value in flat):
        check(func, args, kwargs)
    owners = {id(value.held): value for value in flat if isinstance(value, Emulated)}
    asked = next((value for value in flat if isinstance(value, torch.device)), None)
    onto = bool(owners) if asked is None else asked.type == NAME
    if (
        any(isinstance(value, CPU_GENERATOR) and value._cdata not in Generators.known for value in flat)
        and onto
    ):
        raise WrongDeviceError(f"Expected a '{NAME}' device type for generator but found 'cpu' in {name}")
    real_args, real_kwargs = tree_unflatten([on_cpu(value) for value in flat], spec)
    if real_kwargs.get("pin_memory"):
        real_kwargs["pin_memory"] = False
    result = func(*real_args, **real_kwargs)
    if func is aten._local_scalar_dense.default:
        return result
    if name == "aten::copy_" and not isinstance(args[0], Emulated):
        return args[0]
    if func._schema.is_mutable:
        for owner in owners.values():
            follow(owner)

    def placed(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, Emulated):
            return value
        owner = owners.get(id(value))
        return Emulated(value) if owner is None and onto else value if owner is None else follow(owner)

    return tree_map(placed, result)


def on_cpu(value):
    """Give what the CPU computes with."""
    if isinstance(value, Emulated):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


class Generators(type):
    """Stands for `torch.Generator`, and makes the device's where they are asked for: CPU ones that say otherwise."""

    known: ClassVar[dict] = {}
    """By their address in C++: Python objects come out of the dispatcher anew."""

    def __call__(cls, device="cpu"):
        return OfDevice() if torch.device(device).type == NAME else CPU_GENERATOR(device)

    def __instancecheck__(cls, instance):
        return isinstance(instance, CPU_GENERATOR)


class OfDevice(CPU_GENERATOR):
    """A generator of the device."""

    def __new__(cls):
        made = super().__new__(cls, "cpu")
        key = made._cdata
        Generators.known[key] = weakref.ref(made, lambda _: Generators.known.pop(key, None))
        return made

    @property
    def device(self):
        return torch.device(NAME, 0)


class Backend:
    """What torch asks of `torch.emu`."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def set_device(self, device):
        del device

    def synchronize(self, device=None):
        del device

    def empty_cache(self):
        pass

    def manual_seed_all(self, seed):
        del seed

    def _is_in_bad_fork(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None):
        del device
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        del device
        torch.set_rng_state(state)


LIBRARIES = []
UNDER_PYTHON = (
    "empty.memory_format", "empty_strided.default", "copy_.default", "_to_copy.default", "detach.default",
    "lift_fresh.default",
)  # fmt: skip
"""Operations that can meet a Python tensor below the Python key, where a fallback is refused."""


def install():
    """Register the device, once in a process."""
    if LIBRARIES:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    LIBRARIES.extend([every, own])
    every.fallback(lambda func, *args, **kwargs: dispatch(func, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in UNDER_PYTHON:
        packet, overload = name.split(".")
        func = getattr(getattr(aten, packet), overload)
        own.impl(func, lambda *args, _func=func, **kwargs: dispatch(_func, args, kwargs), "PrivateUse1")
    swap = torch.utils.swap_tensors

    def swap_and_keep_count(one, other):
        # On CUDA `Module.to` writes `.data`, which leaves the count of changes in place as it was.
        count = one._version
        swap(one, other)
        if not one.is_inference():
            torch._C._autograd._unsafe_set_version_counter((one,), (count,))

    torch.utils.swap_tensors = swap_and_keep_count
    torch.Generator = Generators("Generator", (), {"__doc__": CPU_GENERATOR.__doc__})
