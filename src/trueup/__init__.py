"""trueup: online RL for language models in which the rollout engine and the trainer can be shown to agree.

Importing this package loads neither torch nor transformers; the subsystems do when they are used.
"""

__version__ = "0.1.0"
