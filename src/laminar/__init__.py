"""Normalizing flows with exact densities: fit, score, sample, check.

Every public name is loaded when it is first used, so that ``import laminar`` costs nothing, does
not load JAX, and changes no setting of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from laminar._version import __version__

# What type checkers and editors see; `_NAMES` below is the same list for run time.
if TYPE_CHECKING:
    from laminar._errors import InputError as InputError
    from laminar._errors import LaminarError as LaminarError
    from laminar._errors import MissingExtraError as MissingExtraError
    from laminar._errors import ModelFileError as ModelFileError
    from laminar._errors import ShapeError as ShapeError
    from laminar._errors import TrainingError as TrainingError
    from laminar._params import Frozen as Frozen
    from laminar._params import trainable as trainable
    from laminar._registry import register as register
    from laminar.bijections.amortized import Amortized as Amortized
    from laminar.bijections.amortized import amortized as amortized
    from laminar.bijections.attention import (
        TransformerAutoregressive as TransformerAutoregressive,
    )
    from laminar.bijections.attention import (
        transformer_autoregressive as transformer_autoregressive,
    )
    from laminar.bijections.autoregressive import MaskedAutoregressive as MaskedAutoregressive
    from laminar.bijections.autoregressive import masked_autoregressive as masked_autoregressive
    from laminar.bijections.base import AbstractBijection as AbstractBijection
    from laminar.bijections.base import AbstractTransform as AbstractTransform
    from laminar.bijections.base import Identity as Identity
    from laminar.bijections.base import Invert as Invert
    from laminar.bijections.block import BlockAutoregressive as BlockAutoregressive
    from laminar.bijections.circle import CircleMoebius as CircleMoebius
    from laminar.bijections.compose import Chain as Chain
    from laminar.bijections.compose import Independent as Independent
    from laminar.bijections.compose import Indexed as Indexed
    from laminar.bijections.compose import Permute as Permute
    from laminar.bijections.compose import Repeat as Repeat
    from laminar.bijections.compose import Reshape as Reshape
    from laminar.bijections.compose import Stack as Stack
    from laminar.bijections.compose import repeat as repeat
    from laminar.bijections.conjugate import Conjugate as Conjugate
    from laminar.bijections.continuous import Continuous as Continuous
    from laminar.bijections.continuous import VelocityField as VelocityField
    from laminar.bijections.coupling import Coupling as Coupling
    from laminar.bijections.coupling import coupling as coupling
    from laminar.bijections.dequantise import Dequantise as Dequantise
    from laminar.bijections.dequantise import dequantisation_noise as dequantisation_noise
    from laminar.bijections.dynamics import Hamiltonian as Hamiltonian
    from laminar.bijections.dynamics import Langevin as Langevin
    from laminar.bijections.dynamics import Leapfrog as Leapfrog
    from laminar.bijections.elementwise import AbstractElementwise as AbstractElementwise
    from laminar.bijections.elementwise import Affine as Affine
    from laminar.bijections.elementwise import Exp as Exp
    from laminar.bijections.elementwise import LeakyReLU as LeakyReLU
    from laminar.bijections.elementwise import LeakyTanh as LeakyTanh
    from laminar.bijections.elementwise import Power as Power
    from laminar.bijections.elementwise import Shift as Shift
    from laminar.bijections.elementwise import Sigmoid as Sigmoid
    from laminar.bijections.elementwise import SignedPower as SignedPower
    from laminar.bijections.elementwise import SinhArcsinh as SinhArcsinh
    from laminar.bijections.elementwise import Softplus as Softplus
    from laminar.bijections.elementwise import Tanh as Tanh
    from laminar.bijections.elementwise import logit as logit
    from laminar.bijections.image import Haar as Haar
    from laminar.bijections.image import Leading as Leading
    from laminar.bijections.image import PeriodicConv as PeriodicConv
    from laminar.bijections.image import Positionwise as Positionwise
    from laminar.bijections.image import Squeeze as Squeeze
    from laminar.bijections.image import conv1x1 as conv1x1
    from laminar.bijections.image import multiscale as multiscale
    from laminar.bijections.linear import DCT as DCT
    from laminar.bijections.linear import LU as LU
    from laminar.bijections.linear import ActNorm as ActNorm
    from laminar.bijections.linear import Householder as Householder
    from laminar.bijections.linear import LowRank as LowRank
    from laminar.bijections.linear import Matrix as Matrix
    from laminar.bijections.linear import Triangular as Triangular
    from laminar.bijections.manifolds import Cylindrical as Cylindrical
    from laminar.bijections.manifolds import ExponentialMap as ExponentialMap
    from laminar.bijections.manifolds import Projective as Projective
    from laminar.bijections.manifolds import SphereMoebius as SphereMoebius
    from laminar.bijections.masks import MaskedCoupling as MaskedCoupling
    from laminar.bijections.masks import channel_mask as channel_mask
    from laminar.bijections.masks import checkerboard_mask as checkerboard_mask
    from laminar.bijections.masks import conv_coupling as conv_coupling
    from laminar.bijections.monotone import Bernstein as Bernstein
    from laminar.bijections.monotone import DeepSigmoidal as DeepSigmoidal
    from laminar.bijections.monotone import MixtureCDF as MixtureCDF
    from laminar.bijections.monotone import SumOfSquares as SumOfSquares
    from laminar.bijections.monotone import TailTransform as TailTransform
    from laminar.bijections.monotone import UnconstrainedMonotone as UnconstrainedMonotone
    from laminar.bijections.numerical import NumericalInverse as NumericalInverse
    from laminar.bijections.orthogonal import QR as QR
    from laminar.bijections.orthogonal import SVD as SVD
    from laminar.bijections.orthogonal import Cayley as Cayley
    from laminar.bijections.orthogonal import MatrixExponential as MatrixExponential
    from laminar.bijections.quantile import QuantileMap as QuantileMap
    from laminar.bijections.rank_one import Planar as Planar
    from laminar.bijections.rank_one import Radial as Radial
    from laminar.bijections.rank_one import Sylvester as Sylvester
    from laminar.bijections.residual import Residual as Residual
    from laminar.bijections.rotations import QuaternionMap as QuaternionMap
    from laminar.bijections.rotations import RotationCoupling as RotationCoupling
    from laminar.bijections.simplex import Softmax as Softmax
    from laminar.bijections.simplex import StickBreaking as StickBreaking
    from laminar.bijections.splines import Linear as Linear
    from laminar.bijections.splines import RationalQuadratic as RationalQuadratic
    from laminar.bijections.squashing import CDF as CDF
    from laminar.bijections.squashing import LogTanh as LogTanh
    from laminar.bijections.squashing import Softclip as Softclip
    from laminar.bijections.surjections import AbsoluteValue as AbsoluteValue
    from laminar.bijections.surjections import Ordered as Ordered
    from laminar.bijections.surjections import Slice as Slice
    from laminar.bijections.surjections import Sort as Sort
    from laminar.bijections.templates import as_elementwise as as_elementwise
    from laminar.conditional import ConditionalMixture as ConditionalMixture
    from laminar.density import AbstractDistribution as AbstractDistribution
    from laminar.density import Estimate as Estimate
    from laminar.diagnose import CheckReport as CheckReport
    from laminar.diagnose import check as check
    from laminar.directional import Dirichlet as Dirichlet
    from laminar.directional import PowerSpherical as PowerSpherical
    from laminar.directional import UniformOn as UniformOn
    from laminar.directional import VonMisesFisher as VonMisesFisher
    from laminar.distributions import ConditionalNormal as ConditionalNormal
    from laminar.distributions import Logistic as Logistic
    from laminar.distributions import MultivariateNormal as MultivariateNormal
    from laminar.distributions import Normal as Normal
    from laminar.distributions import StudentT as StudentT
    from laminar.distributions import Uniform as Uniform
    from laminar.estimators.classification import FlowClassifier as FlowClassifier
    from laminar.estimators.density import FlowDensity as FlowDensity
    from laminar.estimators.outlier import FlowOutlier as FlowOutlier
    from laminar.estimators.regression import FlowRegressor as FlowRegressor
    from laminar.flow import Flow as Flow
    from laminar.flow import Path as Path
    from laminar.io import load as load
    from laminar.io import read_header as read_header
    from laminar.io import save as save
    from laminar.matching import flow_matching as flow_matching
    from laminar.matching import rnode as rnode
    from laminar.mixed import AutoregressiveDistribution as AutoregressiveDistribution
    from laminar.mixed import ColumnLaw as ColumnLaw
    from laminar.mixed import autoregressive_distribution as autoregressive_distribution
    from laminar.mixtures import GaussianMixture as GaussianMixture
    from laminar.mixtures import IsotropicMixture as IsotropicMixture
    from laminar.mixtures import Mixture as Mixture
    from laminar.nn.attention import CausalTransformer as CausalTransformer
    from laminar.nn.conv import ConvNet as ConvNet
    from laminar.nn.encoders import ImageEncoder as ImageEncoder
    from laminar.nn.encoders import SequenceEncoder as SequenceEncoder
    from laminar.nn.encoders import SetEncoder as SetEncoder
    from laminar.nn.lipschitz import LipschitzConv as LipschitzConv
    from laminar.nn.lipschitz import LipschitzMLP as LipschitzMLP
    from laminar.nn.masked import MaskedMLP as MaskedMLP
    from laminar.nn.mlp import MLP as MLP
    from laminar.nn.potential import PotentialField as PotentialField
    from laminar.objectives import Batch as Batch
    from laminar.objectives import nll as nll
    from laminar.spaces import Rotations as Rotations
    from laminar.spaces import Simplex as Simplex
    from laminar.spaces import Sphere as Sphere
    from laminar.tables.flow import fit_table as fit_table
    from laminar.tables.frames import from_frame as from_frame
    from laminar.tables.frames import to_frame as to_frame
    from laminar.tables.model import TableFlow as TableFlow
    from laminar.tables.read import read_table as read_table
    from laminar.tables.read import write_table as write_table
    from laminar.tables.table import Table as Table
    from laminar.train.density import fit_density as fit_density
    from laminar.train.fit import fit as fit
    from laminar.train.history import History as History
    from laminar.train.source import ArraySource as ArraySource
    from laminar.train.source import MappedSource as MappedSource
    from laminar.train.source import Stream as Stream
    from laminar.zoo import bnaf as bnaf
    from laminar.zoo import cnf as cnf
    from laminar.zoo import gaussianization as gaussianization
    from laminar.zoo import iaf as iaf
    from laminar.zoo import maf as maf
    from laminar.zoo import naf as naf
    from laminar.zoo import nice as nice
    from laminar.zoo import nsf as nsf
    from laminar.zoo import planar as planar
    from laminar.zoo import radial as radial
    from laminar.zoo import realnvp as realnvp
    from laminar.zoo import residual as residual
    from laminar.zoo import sylvester as sylvester
    from laminar.zoo import triangular_spline as triangular_spline
    from laminar.zoo.images import glow as glow
    from laminar.zoo.images import tarflow as tarflow
    from laminar.zoo.manifolds import rotations as rotations
    from laminar.zoo.manifolds import sphere as sphere
    from laminar.zoo.manifolds import torus as torus

_NAMES = {
    "laminar._errors": (
        "InputError",
        "LaminarError",
        "MissingExtraError",
        "ModelFileError",
        "ShapeError",
        "TrainingError",
    ),
    "laminar._params": ("Frozen", "trainable"),
    "laminar._registry": ("register",),
    "laminar.bijections.amortized": ("Amortized", "amortized"),
    "laminar.bijections.attention": (
        "TransformerAutoregressive",
        "transformer_autoregressive",
    ),
    "laminar.bijections.autoregressive": ("MaskedAutoregressive", "masked_autoregressive"),
    "laminar.bijections.base": ("AbstractBijection", "AbstractTransform", "Identity", "Invert"),
    "laminar.bijections.block": ("BlockAutoregressive",),
    "laminar.bijections.circle": ("CircleMoebius",),
    "laminar.bijections.compose": (
        "Chain",
        "Independent",
        "Indexed",
        "Permute",
        "Repeat",
        "Reshape",
        "Stack",
        "repeat",
    ),
    "laminar.bijections.conjugate": ("Conjugate",),
    "laminar.bijections.continuous": ("Continuous", "VelocityField"),
    "laminar.bijections.coupling": ("Coupling", "coupling"),
    "laminar.bijections.dequantise": ("Dequantise", "dequantisation_noise"),
    "laminar.bijections.dynamics": ("Hamiltonian", "Langevin", "Leapfrog"),
    "laminar.bijections.elementwise": (
        "AbstractElementwise",
        "Affine",
        "Exp",
        "LeakyReLU",
        "LeakyTanh",
        "Power",
        "Shift",
        "Sigmoid",
        "SignedPower",
        "SinhArcsinh",
        "Softplus",
        "Tanh",
        "logit",
    ),
    "laminar.bijections.image": (
        "Haar",
        "Leading",
        "PeriodicConv",
        "Positionwise",
        "Squeeze",
        "conv1x1",
        "multiscale",
    ),
    "laminar.bijections.linear": (
        "ActNorm",
        "DCT",
        "Householder",
        "LU",
        "LowRank",
        "Matrix",
        "Triangular",
    ),
    "laminar.bijections.manifolds": (
        "Cylindrical",
        "ExponentialMap",
        "Projective",
        "SphereMoebius",
    ),
    "laminar.bijections.masks": (
        "MaskedCoupling",
        "channel_mask",
        "checkerboard_mask",
        "conv_coupling",
    ),
    "laminar.bijections.monotone": (
        "Bernstein",
        "DeepSigmoidal",
        "MixtureCDF",
        "SumOfSquares",
        "TailTransform",
        "UnconstrainedMonotone",
    ),
    "laminar.bijections.numerical": ("NumericalInverse",),
    "laminar.bijections.orthogonal": ("Cayley", "MatrixExponential", "QR", "SVD"),
    "laminar.bijections.quantile": ("QuantileMap",),
    "laminar.bijections.rank_one": ("Planar", "Radial", "Sylvester"),
    "laminar.bijections.residual": ("Residual",),
    "laminar.bijections.rotations": ("QuaternionMap", "RotationCoupling"),
    "laminar.bijections.simplex": ("Softmax", "StickBreaking"),
    "laminar.bijections.splines": ("Linear", "RationalQuadratic"),
    "laminar.bijections.squashing": ("CDF", "LogTanh", "Softclip"),
    "laminar.bijections.surjections": ("AbsoluteValue", "Ordered", "Slice", "Sort"),
    "laminar.bijections.templates": ("as_elementwise",),
    "laminar.conditional": ("ConditionalMixture",),
    "laminar.density": ("AbstractDistribution", "Estimate"),
    "laminar.diagnose": ("CheckReport", "check"),
    "laminar.directional": ("Dirichlet", "PowerSpherical", "UniformOn", "VonMisesFisher"),
    "laminar.distributions": (
        "ConditionalNormal",
        "Logistic",
        "MultivariateNormal",
        "Normal",
        "StudentT",
        "Uniform",
    ),
    "laminar.estimators.classification": ("FlowClassifier",),
    "laminar.estimators.density": ("FlowDensity",),
    "laminar.estimators.outlier": ("FlowOutlier",),
    "laminar.estimators.regression": ("FlowRegressor",),
    "laminar.flow": ("Flow", "Path"),
    "laminar.io": ("load", "read_header", "save"),
    "laminar.matching": ("flow_matching", "rnode"),
    "laminar.mixed": (
        "AutoregressiveDistribution",
        "ColumnLaw",
        "autoregressive_distribution",
    ),
    "laminar.mixtures": ("GaussianMixture", "IsotropicMixture", "Mixture"),
    "laminar.nn.encoders": ("ImageEncoder", "SequenceEncoder", "SetEncoder"),
    "laminar.nn.attention": ("CausalTransformer",),
    "laminar.nn.conv": ("ConvNet",),
    "laminar.nn.lipschitz": ("LipschitzConv", "LipschitzMLP"),
    "laminar.nn.masked": ("MaskedMLP",),
    "laminar.nn.mlp": ("MLP",),
    "laminar.nn.potential": ("PotentialField",),
    "laminar.objectives": ("Batch", "nll"),
    "laminar.spaces": ("Rotations", "Simplex", "Sphere"),
    "laminar.tables.flow": ("fit_table",),
    "laminar.tables.frames": ("from_frame", "to_frame"),
    "laminar.tables.model": ("TableFlow",),
    "laminar.tables.read": ("read_table", "write_table"),
    "laminar.tables.table": ("Table",),
    "laminar.train.density": ("fit_density",),
    "laminar.train.fit": ("fit",),
    "laminar.train.history": ("History",),
    "laminar.train.source": ("ArraySource", "MappedSource", "Stream"),
    "laminar.zoo": (
        "bnaf",
        "cnf",
        "gaussianization",
        "iaf",
        "maf",
        "naf",
        "nice",
        "nsf",
        "planar",
        "radial",
        "realnvp",
        "residual",
        "sylvester",
        "triangular_spline",
    ),
    "laminar.zoo.images": ("glow", "tarflow"),
    "laminar.zoo.manifolds": ("rotations", "sphere", "torus"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = (
    "bijections",
    "conditional",
    "density",
    "diagnose",
    "directional",
    "distributions",
    "estimators",
    "export",
    "flow",
    "inference",
    "io",
    "matching",
    "mixed",
    "mixtures",
    "nn",
    "objectives",
    "preset",
    "report",
    "scores",
    "spaces",
    "tables",
    "testing",
    "train",
    "zoo",
)

__all__ = ["__version__", *_HOMES, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"laminar.{name}")
    else:
        raise AttributeError(f"module 'laminar' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
