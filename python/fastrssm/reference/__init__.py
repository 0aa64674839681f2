"""The executable specification of every op: plain PyTorch, nothing else."""

from fastrssm.reference.categorical_kl import categorical_kl as categorical_kl
from fastrssm.reference.gaussian_kl import gaussian_kl as gaussian_kl
from fastrssm.reference.gaussian_nll import gaussian_nll as gaussian_nll
from fastrssm.reference.gru_cell import Cell as Cell
from fastrssm.reference.gru_cell import gru_cell as gru_cell
from fastrssm.reference.lambda_return import lambda_return as lambda_return
from fastrssm.reference.mlp import mlp as mlp
from fastrssm.reference.rssm_imagine import rssm_imagine as rssm_imagine
from fastrssm.reference.rssm_imagine_policy import rssm_imagine_policy as rssm_imagine_policy
from fastrssm.reference.rssm_observe import rssm_observe as rssm_observe
from fastrssm.reference.rssm_observe_policy import rssm_observe_policy as rssm_observe_policy
from fastrssm.reference.rssm_weights import Heads as Heads
from fastrssm.reference.rssm_weights import Latent as Latent
from fastrssm.reference.rssm_weights import Layer as Layer
from fastrssm.reference.rssm_weights import PolicyTrajectory as PolicyTrajectory
from fastrssm.reference.rssm_weights import PolicyWeights as PolicyWeights
from fastrssm.reference.rssm_weights import RSSMWeights as RSSMWeights
from fastrssm.reference.rssm_weights import Trajectory as Trajectory
