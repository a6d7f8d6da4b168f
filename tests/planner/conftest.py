import pytest

from ernie_jax.config import ModelConfig


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    """Dimensions that TPU kernels take, and few enough layers to compile within seconds."""
    return ModelConfig(
        "ernie4_5_moe",
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=128,
        moe_num_shared_experts=2,
    )
