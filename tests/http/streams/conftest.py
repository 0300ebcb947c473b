from tests.runtime.conftest import bench, image_folder  # noqa: F401
