"""TDPO and TGDPO as trainers of TRL (extra `trl`): docs/trl.md has how they are used, and what they refuse.

hooks.py is what they need of TRL, checked at import; config.py the settings, trainers.py the trainers, reading.py how a model is
read without its logits. Losses, their hyperparameters and the tiles are the library's own.
"""

from tpo_lib.trl.config import TDPOConfig as TDPOConfig
from tpo_lib.trl.config import TGDPOConfig as TGDPOConfig
from tpo_lib.trl.trainers import TDPOTrainer as TDPOTrainer
from tpo_lib.trl.trainers import TGDPOTrainer as TGDPOTrainer
