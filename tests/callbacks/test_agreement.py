import torch.distributed as dist
import torch.multiprocessing as mp

from smalto.callbacks.agreement import Agreement


def answers(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    agreement = Agreement()
    found = [agreement.any(flag) for flag in ([False, False, True, False, False] if rank else [False] * 5)]
    assert found == [False, False, False, True, False]
    assert agreement.any(rank == 0) is False
    assert agreement.answer() is True
    assert agreement.answer() is False
    dist.destroy_process_group()


def test_alone_a_flag_is_its_own_answer():
    agreement = Agreement()
    assert [agreement.any(flag) for flag in (False, True)] == [False, True]
    assert agreement.answer() is False


def test_all_learn_of_a_flag_one_call_later(tmp_path):
    mp.spawn(answers, (str(tmp_path),), nprocs=2)
