"""``strategy=ddp``: a copy of the model per device, gradients averaged while the backward pass goes on."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import nn


class NetworkDDPStrategy(DDPStrategy):
    """Lightning's strategy, with one wrap per network for tasks that train several.

    One wrap around all of them reduces every gradient in every backward pass, also of networks that had no part in it.
    A task that has ``wrap_networks`` makes its own: each reduces in the backward pass of its own forward pass, and one
    that is not called reduces nothing. Options are those of Lightning's.
    """

    def configure_ddp(self) -> None:
        """Wrap the task, or let it wrap its networks; they are on their device, optimizers come after this."""
        wrap_networks = getattr(self.lightning_module, "wrap_networks", None)
        if wrap_networks is None:
            super().configure_ddp()
        else:
            wrap_networks(self._replica)

    def _replica(self, net: nn.Module) -> Any:
        task, self.model = self.model, self._setup_model(net)
        try:
            self._register_ddp_hooks()  # of the options; Lightning looks for what it wrapped in `model`
            return self.model
        finally:
            self.model = task
