// Crocoddyl's solvers.

#include "action_model.hpp"

#include "crocoddyl/core/solvers/box-ddp.hpp"
#include "crocoddyl/core/solvers/box-fddp.hpp"
#include "crocoddyl/core/solvers/fddp.hpp"

namespace {

Method named(const std::string& name, Problem problem, double tolerance) {
  Method method;
  if (name == "BoxDDP") {
    method = std::make_unique<crocoddyl::SolverBoxDDP>(problem);
  } else if (name == "BoxFDDP") {
    method = std::make_unique<crocoddyl::SolverBoxFDDP>(problem);
  } else {
    method = std::make_unique<crocoddyl::SolverFDDP>(problem);
  }
  method->set_th_stop(tolerance);
  return method;
}

}  // namespace
