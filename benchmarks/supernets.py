"""Supernets that benchmarks train: each once, continued after a kill."""

from __future__ import annotations

import time
from dataclasses import replace

from apq.files import write_json
from apq.model_folder import ModelFolder
from apq.resume import Resume
from elastic_nn.networks.dynamic_proxyless import DynamicProxylessNASNets
from elastic_nn.networks.supernet_file import load_supernet, save_supernet
from elastic_nn.training.progressive_shrinking import SupernetPlan, supernet_record, train_supernet
from elastic_nn.training.session import Session


def trained_once(folder: ModelFolder, plan: SupernetPlan, session: Session) -> DynamicProxylessNASNets:
    """The supernet in a folder, on the device of the session; trained unless its file exists.

    `training.json` beside it has the processor seconds since the last kill, and one record a phase.
    """
    if not folder.supernet.exists():
        session = replace(session, progress=True)
        resume = Resume(folder.supernet_state, supernet_record(plan, session), "training")
        started = time.process_time()
        net, records = train_supernet(plan, session, resume)
        facts = {"seed": session.seed, "cpu_s": round(time.process_time() - started, 1)}
        write_json(folder.training, {**facts, "phases": records})
        save_supernet(folder.supernet, net.cpu(), plan.recipe.name, session.splits.source, seed=session.seed)
        resume.done()
    return load_supernet(folder.supernet, plan.space)[0].to(session.device)
