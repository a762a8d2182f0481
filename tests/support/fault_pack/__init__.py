"""A node that puts a fault into a model, and a route with the phase of each worker."""

import fault_injection
from aiohttp import web
from comfy.patcher_extension import WrappersMP
from server import PromptServer


class InjectFault:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "inject"
    CATEGORY = "faults"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "rank": ("INT", {"default": 1}),
                "what": ("STRING", {"default": "raise"}),
                "where": ("STRING", {"default": fault_injection.AT_MODEL}),
                "call": ("INT", {"default": 1}),
                "seconds": ("FLOAT", {"default": 0.0}),
            }
        }

    def inject(self, model, rank, what, where, call, seconds):
        fault = fault_injection.Fault(rank, what, call, seconds)
        model = model.clone()
        if where == fault_injection.AT_MODEL:
            model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "fault", fault.around_model)
        elif where == fault_injection.AT_BLOCK:
            model.set_model_patch_replace(fault.around_block, "dit", "double_block", 1)
        else:
            model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "fault", fault.around_run)
        return (model,)


@PromptServer.instance.routes.get("/faults/phases")
async def phases(_):
    from raylight.cluster import active_session

    session = active_session.running()
    return web.json_response({} if session is None else session.phases)


NODE_CLASS_MAPPINGS = {"InjectFault": InjectFault}
