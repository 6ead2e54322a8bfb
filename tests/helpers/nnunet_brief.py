"""`nnUNetv2_train`, but over in a minute: the default trainer, under its own name, with few epochs
and iterations.
"""

import functools

from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

initialize = nnUNetTrainer.__init__


@functools.wraps(initialize)  # the trainer reads its own signature
def initialize_briefly(self, *arguments, **named):
    initialize(self, *arguments, **named)
    self.num_epochs = 2
    self.num_iterations_per_epoch = 25
    self.num_val_iterations_per_epoch = 1
    self.initial_lr = 0.03


nnUNetTrainer.__init__ = initialize_briefly

if __name__ == "__main__":
    run_training_entry()
