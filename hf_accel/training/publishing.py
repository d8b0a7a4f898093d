"""The part of `PretrainTrainer` that describes and publishes a run, in place of what transformers' Trainer pushes."""

from collections.abc import Mapping
from typing import Any, cast

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..checkpoints import licence_of_trained
from ..data import ImageSource
from ..hub import Publication
from ..hub.callback import PushCallback
from ..report import describe_data
from ..run_folder import RunFolder
from ..utils.errors import fail
from .record import training_results


class PublishingTrainer(Trainer):
    """A Trainer whose pushes hold the encoder, its card and its results."""

    folder: RunFolder
    source: ImageSource
    validation: ImageSource | None
    given_record: Mapping[str, Any] | None
    _pushed_to: Publication | None = None

    def results(self) -> dict[str, Any]:
        """What results.json holds about the training so far."""
        return {**training_results(self), "data": self.describe_data()}

    def describe_data(self) -> dict[str, Any]:
        """What results.json holds about the images."""
        return describe_data((self.given_record or {}).get("data"), self.source, self.validation)

    def publication(self, license: str | None = None) -> Publication:
        """The run and its repository. Pushes while training runs and the one at the end share one queue."""
        if self._pushed_to and license in (None, self._pushed_to.license):
            return self._pushed_to
        args, recorded = self.args, (self.given_record or {}).get("license")
        return Publication(
            str(args.output_dir),
            args.hub_model_id,
            private=bool(args.hub_private_repo),
            license=license or recorded or self._licence_of_start() or Publication.license,
            optimizer=args.hub_strategy == HubStrategy.CHECKPOINT,
            in_python=self.given_record is None,
            by_call=not args.push_to_hub,
        )

    def _licence_of_start(self) -> str | None:
        """The licence that follows from that of the encoder which training started from, if it did."""
        start = cast(Any, self.model).config.init_from
        return licence_of_trained(start.get("license")) if start else None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find out before training why nothing could be pushed to the Hub."""
        publication = self.publication()
        publication.start()
        self._pushed_to = publication
        if self.args.hub_strategy != HubStrategy.END and self.is_world_process_zero():
            self.add_callback(PushCallback(publication, self.results))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """`PushCallback` does this, once the checkpoint is complete."""

    def create_model_card(self, *args: Any, license: str | None = None, **kwargs: Any) -> None:
        """Write the card of a finished run into `final/`. One that somebody has edited stays."""
        if self.is_world_process_zero():  # Others may be here before this one has written the run's last files.
            self._check_finished()
            self.publication(license).complete_final(self.folder.read_results())

    def push_to_hub(self, commit_message: str | None = None, blocking: bool = True, **kwargs: Any) -> None:
        """Upload the finished run: encoder, processor, code, card, settings and results. Nothing that is there already.

        It takes a token: log in by `hf auth login`, or set HF_TOKEN. The repository is public unless
        `hub_private_repo=True`.

        Args:
            license (`str`, *optional*): The model's, for its card. Default: that of the encoder which training
                started from, or unknown if none is stated. From random weights: apache-2.0.

        Raises:
            SettingError: the run is not finished.
            PushFailed: the Hub cannot be reached or refuses. Nothing is lost, and the call can be repeated.
        """
        if self.is_world_process_zero():
            self._check_finished()
            self.publication(kwargs.get("license")).publish()

    def _check_finished(self) -> None:
        if not self.folder.is_complete():
            fail("output_dir", str(self.folder), "its run is not finished; call train() first")
