// The solver of mim-solvers that takes constraints, with exact quadratic programs.

#include "action_model.hpp"

#include "mim_solvers/csqp_proxqp.hpp"

namespace {

Method named(const std::string&, Problem problem, double tolerance) {
  auto method = std::make_unique<mim_solvers::SolverPROXQP>(problem);
  method->set_termination_tolerance(tolerance);
  // The errors of the quadratic programs stay below that.
  method->set_eps_abs(tolerance / 100);
  method->set_eps_rel(0.0);
  return method;
}

}  // namespace
